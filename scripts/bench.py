"""Speed and memory beside real Qlib, KunQuant and hand-written code, as ratios of one run.

    python scripts/bench.py --provider FOLDER --qlib-python PYTHON [--threads 2] [--only lstm]

FOLDER holds bars in Qlib's layout with a universe nyse500; PYTHON is one with pyqlib (and
kunquant, a compiler for it). Every measurement runs in a process of its own, ours and theirs in
turns on the same data and threads. Prints a table in Markdown; --json keeps the raw figures.
Without --qlib-python the columns that need it stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent / "benchmark"
NETWORKS = ("lstm", "gru", "alstm", "tcn", "transformer", "gats")


class Bench:
    """Runs the works in subprocesses and collects rows of the table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.raw: dict[str, Any] = {}

    def run(self, side: str, work: str, *, threads: int, **options: Any) -> dict[str, Any] | None:
        theirs = side in ("qlib_side", "kunquant_side", "zoo_qlib")
        python = self.args.qlib_python if theirs else sys.executable
        if python is None:
            return None
        command = [python, str(HERE / f"{side}.py"), work]
        if side == "zoo_qlib":  # its file says everything
            return self._answer(command, f"{side} {Path(work).stem}", threads)
        command += ["--threads", str(threads)]
        if side != "kunquant_side":
            command += ["--provider", self.args.provider, "--work", str(self.folder)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return self._answer(command, f"{side} {work}", threads)

    def _answer(self, command: list[str], name: str, threads: int) -> dict[str, Any] | None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DO_NOT_TRACK": "true"}
        print(f"... {name} threads={threads}", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return None
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        self.raw[f"{name} {threads}"] = result
        return result

    def ours(self, work: str, *, threads: int, **options: Any) -> dict[str, Any] | None:
        return self.run("qtorch_side", work, threads=threads, **options)

    def qlib(self, work: str, *, threads: int) -> dict[str, Any] | None:
        return self.run("qlib_side", work, threads=threads)

    def both(
        self, work: str, *, threads: int, rounds: int | None = None, **options: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Ours and Qlib's in turns, `rounds` (else `--rounds`) times: of each figure the median."""
        turns = [
            (self.ours(work, threads=threads, **options), self.qlib(work, threads=threads))
            for _ in range(rounds or self.args.rounds)
        ]
        ours, theirs = (middle(side) for side in zip(*turns, strict=True))
        self.raw |= {f"qtorch_side {work} {threads}": ours, f"qlib_side {work} {threads}": theirs}
        return ours, theirs

    def row(self, work: str, ours: Any, theirs: Any, ratio: float | None, goal: str) -> None:
        shown = "" if ratio is None else f"{ratio:.2f}" if ratio < 3 else f"{ratio:.1f}"
        self.rows.append((work, str(ours), str(theirs), shown, goal))
        print("| " + " | ".join(self.rows[-1]) + " |", file=sys.stderr, flush=True)


def middle(results: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The median of each figure; None where one of the results is missing."""
    found = [r for r in results if r is not None]
    if len(found) < len(results):
        return None
    return {
        key: median(r[key] for r in found) if isinstance(value, float) else value
        for key, value in found[0].items()
    }


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def rate(count: float, value: float | None) -> str:
    return "-" if value is None else f"{count / value:,.0f}/s"


def features(bench: Bench) -> None:
    for threads in sorted({1, bench.args.threads}):
        ours, qlib = bench.both("features", threads=threads, repeats=bench.args.repeats)
        kun = bench.run("kunquant_side", str(bench.folder / "bars.npz"), threads=threads)
        if ours is None:
            continue
        theirs = qlib and qlib["seconds"]
        name = f"Alpha158, 158 columns, {threads} thread(s)"
        bench.row(name + ", reading", seconds(ours["seconds"]), "Qlib " + seconds(theirs),
                  over(theirs, ours["seconds"]), ">= 20")  # fmt: skip
        compiled = median(kun["seconds"]) if kun else None
        bench.row(name + ", alone", seconds(ours["alone"]), "KunQuant " + seconds(compiled),
                  over(compiled, ours["alone"]), "> 1")  # fmt: skip


def handlers(bench: Bench) -> None:
    for work, speed, memory in (("alpha158", ">= 10", "<= 0.5"), ("alpha360", ">= 20", "<= 0.33")):
        once = 1 if work == "alpha360" else None  # seven minutes a turn of Qlib's
        ours, qlib = bench.both(work, threads=bench.args.threads, rounds=once)
        if ours is None:
            continue
        theirs = qlib or {"seconds": None, "mib": None}
        years = ", 2 years" if work == "alpha360" else ""
        name = f"{work.capitalize()}{years}, handler to the first batch"
        bench.row(name, seconds(ours["seconds"]), "Qlib " + seconds(theirs["seconds"]),
                  over(theirs["seconds"], ours["seconds"]), speed)  # fmt: skip
        bench.row(name + ", peak memory", f"{ours['mib']:,.0f} MiB",
                  f"Qlib {theirs['mib'] or 0:,.0f} MiB",
                  over(ours["mib"], theirs["mib"]), memory)  # fmt: skip
        bench.row(f"{work.capitalize()} prepare, the full frame", seconds(ours["prepare_seconds"]),
                  f"{ours['prepare_mib']:,.0f} MiB more", None, "")  # fmt: skip


def windows(bench: Bench) -> None:
    ours, qlib = bench.both("windows", threads=1, repeats=bench.args.repeats)
    if ours is None:
        return
    speed = ours["samples"] / ours["seconds"]
    theirs = qlib["samples"] / qlib["seconds"] if qlib else None
    bench.row("Random window batches, 20 x 20", f"{speed:,.0f}/s",
              f"Qlib {theirs or 0:,.0f}/s", over(speed, theirs), ">= 30")  # fmt: skip
    bench.row("The same, beside a bare index gather", f"{speed:,.0f}/s",
              f"bare {rate(ours['samples'], ours['bare'])}",
              ours["bare"] / ours["seconds"], ">= 0.8")  # fmt: skip
    bench.row("The same, beside index_select of whole windows", f"{speed:,.0f}/s",
              f"index_select {rate(ours['samples'], ours['select'])}",
              ours["select"] / ours["seconds"], "stated")  # fmt: skip


def lstm(bench: Bench) -> None:
    ours, qlib = bench.both("lstm", threads=1, repeats=3)
    if ours is None:
        return
    n = ours["samples"]
    train = ours["train_seconds"]
    bench.row("LSTM fit, train pass", rate(n, train), f"hand-written {rate(n, ours['hand'])}",
              ours["hand"] / train, ">= 0.95")  # fmt: skip
    epoch = qlib and qlib["epoch"]
    bench.row("LSTM fit, whole epoch", seconds(ours["epoch_seconds"]), "Qlib " + seconds(epoch),
              over(epoch, ours["epoch_seconds"]), ">= 1.7")  # fmt: skip
    m = ours["test_samples"]
    bench.row("LSTM predict, test segment", rate(m, ours["predict"]),
              f"ready tensors {rate(m, ours['infer'])}",
              ours["infer"] / ours["predict"], ">= 0.9")  # fmt: skip
    predict = qlib and qlib["predict"]
    bench.row("LSTM predict, test segment", seconds(ours["predict"]), "Qlib " + seconds(predict),
              over(predict, ours["predict"]), "stated")  # fmt: skip


def mlp(bench: Bench) -> None:
    ours = bench.ours("mlp", threads=1, repeats=4)
    if ours is None:
        return
    n, train = ours["samples"], ours["train_seconds"]
    step = 1000 * ours["hand"] / (n / 800)
    name = f"MLP fit, a step of {step:.2f} ms, inner_steps auto ({ours['inner_steps']})"
    bench.row(name, rate(n, train),
              f"hand-written {rate(n, ours['hand'])}", ours["hand"] / train, ">= 0.85")  # fmt: skip


def networks(bench: Bench) -> None:
    """Whole epochs beside Qlib's own classes, and train passes beside a hand-written loop.

    An epoch of ours is the train pass and the valid segment; Qlib's `fit` goes over the train
    segment once more, for its metric.
    """
    for name in NETWORKS:
        ours = bench.run("network_side", name, threads=1, repeats=3)
        if ours is None:
            continue
        step = 1000 * ours["hand_step"]
        shown = f"{name} fit, {ours['instruments']} instruments, {ours['days']} days"
        bench.row(f"{shown}, train pass, a step of {step:.0f} ms", f"{ours['train_rate']:,.0f}/s",
                  f"hand-written {ours['hand_rate']:,.0f}/s", ours["share"],
                  ">= 0.95" if step >= 20 else ">= 0.85")  # fmt: skip
        qlib = bench.run("zoo_qlib", ours["job"], threads=1)
        epoch, theirs = ours["epoch_rate"], qlib and qlib["epoch_rate"]
        bench.row(f"{shown}, whole epoch", f"{epoch:,.0f}/s",
                  f"Qlib {theirs or 0:,.0f}/s", over(epoch, theirs), "stated")  # fmt: skip


def trainer(bench: Bench) -> None:
    ours, qlib = bench.both("trainer", threads=1)
    if ours is None:
        return
    mine = ours["task"] - ours["bare"]
    theirs = qlib["task"] - qlib["bare"] if qlib else None
    bench.row("TrainerR, overhead of a tiny task, sqlite", seconds(mine),
              "Qlib " + seconds(theirs), over(theirs, mine), ">= 1")  # fmt: skip


def pooled(bench: Bench) -> None:
    done = bench.run("pooled_side", "pooled", threads=1)
    if done is None:
        return
    mine, theirs = done["pooled"], done["here"]
    bench.row("TrainerRM, a tiny training, sqlite", seconds(mine),
              "TrainerR " + seconds(theirs), 1 / done["ratio"], ">= 0.95")  # fmt: skip


def pool(bench: Bench) -> None:
    for store, name, asked in (
        ("sqlite", "SQLite", {"1": 300, "8": 300}),
        ("postgres", "PostgreSQL", {"8": 500}),
        ("mongo", "MongoDB's wire (SecantusDB)", {}),
    ):
        few = {"tasks": 50} if store == "mongo" else {}  # a server for tests, not for speed
        done = bench.run("pool_side", store, threads=1, **few)
        for workers, pace in done[store].items() if done else ():
            least = asked.get(workers)
            bench.row(f"Pool on {name}, claim and commit, {workers} workers", f"{pace:,.0f}/s",
                      "asked " + (f"{least}/s" if least else "-"), over(pace, least),
                      ">= 1" if least else "-")  # fmt: skip


def rolling(bench: Bench) -> None:
    done = bench.run("rolling_side", "rolling", threads=bench.args.threads)
    if done is None:
        return
    bench.row(f"Rolling study, {done['windows']} windows, Alpha158, shared features",
              seconds(done["shared"]), f"each its own {seconds(done['own'])}",
              done["ratio"], ">= 3")  # fmt: skip


def sweep(bench: Bench) -> None:
    done = bench.run("sweep_side", "sweep", threads=1)
    if done is None:
        return
    bench.row("A sweep's job beside a bare run, a tiny task, seconds more", seconds(done["job"]),
              f"bare {seconds(done['bare'])}", done["overhead"], "< 1.5")  # fmt: skip


def resume(bench: Bench) -> None:
    done = bench.run("resume_side", "resume", threads=1)
    if done is None:
        return
    share = done["with"] / done["without"]
    bench.row(f"MLP, {done['epochs']} epochs with a checkpoint after each", seconds(done["with"]),
              f"without {seconds(done['without'])}", share, "<= 1.03")  # fmt: skip
    bench.row("From fit to the first batch, out of a checkpoint", seconds(done["resumed"]),
              f"a fresh fit {seconds(done['fresh'])}", None, "stated")  # fmt: skip


def backtests(bench: Bench) -> None:
    ours = bench.run("backtest_side", "backtest", threads=1)
    qlib = bench.qlib("backtest", threads=1)
    if ours is None:
        return
    theirs = qlib or {"seconds": None, "mib": None}
    name = "Backtest of 23 months, 500 instruments, topk 50"
    bench.row(name, f"{ours['one']:.3g} s, {ours['one_mib']:,.0f} MiB",
              f"Qlib {seconds(theirs['seconds'])}, {theirs['mib'] or 0:,.0f} MiB",
              over(theirs["seconds"], ours["one"]), ">= 20")  # fmt: skip
    bench.row("64 score columns at once", f"{ours['many']:.3g} s, {ours['many_mib']:,.0f} MiB",
              f"64 single passes {seconds(ours['singles'])}",
              over(ours["singles"], ours["many"]), ">= 5")  # fmt: skip


WORKS = {
    "features": features,
    "handlers": handlers,
    "windows": windows,
    "lstm": lstm,
    "mlp": mlp,
    "networks": networks,
    "trainer": trainer,
    "pool": pool,
    "pooled": pooled,
    "rolling": rolling,
    "sweep": sweep,
    "resume": resume,
    "backtests": backtests,
}


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", required=True)
    parser.add_argument("--qlib-python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and Qlib's")
    parser.add_argument("--only", default=",".join(WORKS), help="works, by comma")
    parser.add_argument("--json", help="a file for the raw figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for name in args.only.split(","):
            WORKS[name](bench)
    print(f"\nMeasured on {device_name()}.\n")
    print("| work | qtorch | beside | ratio | asked |\n|---|---|---|---|---|")
    for row in bench.rows:
        print("| " + " | ".join(row) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(bench.raw, indent=1))


if __name__ == "__main__":
    main()
