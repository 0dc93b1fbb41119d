"""Benchmark speed and memory against real Qlib, KunQuant and hand-written code, as ratios.

    python scripts/bench.py --provider FOLDER --qlib-python PYTHON [--threads 2] [--only lstm]

FOLDER holds bars in Qlib's layout with a universe nyse500. PYTHON is a Python interpreter with
pyqlib (and kunquant with a compiler). Each measurement runs in a process of its own; qtorch and
Qlib run alternately on the same data and with the same number of threads. Prints a Markdown table;
--json saves the raw results. Without --qlib-python the columns that need it stay empty.
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

BENCHMARK_FOLDER = Path(__file__).resolve().parent / "benchmark"
NETWORKS = ("lstm", "gru", "alstm", "tcn", "transformer", "gats")


class Bench:
    """Runs the measurements in subprocesses and collects the rows of the table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.raw: dict[str, Any] = {}

    def run(self, side: str, work: str, *, threads: int, **options: Any) -> dict[str, Any] | None:
        needs_qlib_python = side in ("qlib_side", "kunquant_side", "zoo_qlib")
        python = self.args.qlib_python if needs_qlib_python else sys.executable
        if python is None:
            return None
        command = [python, str(BENCHMARK_FOLDER / f"{side}.py"), work]
        if side == "zoo_qlib":  # the job file holds all options
            return self._run_command(command, f"{side} {Path(work).stem}", threads)
        command += ["--threads", str(threads)]
        if side != "kunquant_side":
            command += ["--provider", self.args.provider, "--work", str(self.folder)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return self._run_command(command, f"{side} {work}", threads)

    def _run_command(self, command: list[str], name: str, threads: int) -> dict[str, Any] | None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DO_NOT_TRACK": "true"}
        print(f"... {name} threads={threads}", file=sys.stderr, flush=True)
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            print(process.stderr[-3000:], file=sys.stderr)
            return None
        result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
        self.raw[f"{name} {threads}"] = result
        return result

    def run_qtorch(self, work: str, *, threads: int, **options: Any) -> dict[str, Any] | None:
        return self.run("qtorch_side", work, threads=threads, **options)

    def run_qlib(self, work: str, *, threads: int) -> dict[str, Any] | None:
        return self.run("qlib_side", work, threads=threads)

    def run_both(
        self, work: str, *, threads: int, rounds: int | None = None, **options: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Run qtorch and Qlib alternately; return the medians over `rounds` (default: --rounds)."""
        results = [
            (
                self.run_qtorch(work, threads=threads, **options),
                self.run_qlib(work, threads=threads),
            )
            for _ in range(rounds or self.args.rounds)
        ]
        qtorch, qlib = (median_result(side) for side in zip(*results, strict=True))
        self.raw |= {f"qtorch_side {work} {threads}": qtorch, f"qlib_side {work} {threads}": qlib}
        return qtorch, qlib

    def add_row(
        self, name: str, qtorch: Any, reference: Any, ratio: float | None, target: str
    ) -> None:
        ratio_text = "" if ratio is None else f"{ratio:.2f}" if ratio < 3 else f"{ratio:.1f}"
        self.rows.append((name, str(qtorch), str(reference), ratio_text, target))
        print("| " + " | ".join(self.rows[-1]) + " |", file=sys.stderr, flush=True)


def median_result(results: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The median of each number; None if one of the results is missing."""
    present = [r for r in results if r is not None]
    if len(present) < len(results):
        return None
    return {
        key: median(r[key] for r in present) if isinstance(value, float) else value
        for key, value in present[0].items()
    }


def safe_ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def format_seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def format_rate(count: float, value: float | None) -> str:
    return "-" if value is None else f"{count / value:,.0f}/s"


def measure_features(bench: Bench) -> None:
    for threads in sorted({1, bench.args.threads}):
        qtorch, qlib = bench.run_both("features", threads=threads, repeats=bench.args.repeats)
        bars = str(bench.folder / "bars_alpha158.npz")
        kunquant = bench.run("kunquant_side", bars, threads=threads)
        if qtorch is None:
            continue
        qlib_seconds = qlib and qlib["seconds"]
        name = f"Alpha158, 158 columns, {threads} thread(s)"
        bench.add_row(
            name + ", with reading the bars",
            format_seconds(qtorch["seconds"]),
            "Qlib " + format_seconds(qlib_seconds),
            safe_ratio(qlib_seconds, qtorch["seconds"]),
            ">= 20",
        )
        kunquant_seconds = median(kunquant["seconds"]) if kunquant else None
        bench.add_row(
            name + ", without reading",
            format_seconds(qtorch["alone"]),
            "KunQuant " + format_seconds(kunquant_seconds),
            safe_ratio(kunquant_seconds, qtorch["alone"]),
            "> 1",
        )


def measure_alpha101(bench: Bench) -> None:
    for threads in sorted({1, bench.args.threads}):
        qtorch = bench.run("qtorch_side", "features101", threads=threads, repeats=3)
        if qtorch is None:
            continue
        bars = str(bench.folder / "bars_alpha101.npz")
        kunquant = bench.run("kunquant_side", bars, threads=threads, alphas="alpha101", repeats=3)
        seconds = median(kunquant["seconds"]) if kunquant else None
        # By column, because KunQuant lacks the alphas with industries.
        rate = qtorch["columns"] / qtorch["alone"]
        kunquant_rate = kunquant["columns"] / seconds if kunquant and seconds else None
        bench.add_row(
            f"Alpha101, {qtorch['columns']} columns, {threads} thread(s), without reading",
            format_seconds(qtorch["alone"]),
            f"KunQuant, {kunquant['columns'] if kunquant else 0} columns {format_seconds(seconds)}",
            safe_ratio(rate, kunquant_rate),
            "by column",
        )


def measure_handlers(bench: Bench) -> None:
    for work, speed_target, memory_target in (
        ("alpha158", ">= 10", "<= 0.5"),
        ("alpha360", ">= 20", "<= 0.33"),
    ):
        rounds = 1 if work == "alpha360" else None  # one run of Qlib takes seven minutes
        qtorch, qlib = bench.run_both(work, threads=bench.args.threads, rounds=rounds)
        if qtorch is None:
            continue
        qlib_result = qlib or {"seconds": None, "mib": None}
        years = ", 2 years" if work == "alpha360" else ""
        name = f"{work.capitalize()}{years}, from handler to first batch"
        bench.add_row(
            name,
            format_seconds(qtorch["seconds"]),
            "Qlib " + format_seconds(qlib_result["seconds"]),
            safe_ratio(qlib_result["seconds"], qtorch["seconds"]),
            speed_target,
        )
        bench.add_row(
            name + ", peak memory",
            f"{qtorch['mib']:,.0f} MiB",
            f"Qlib {qlib_result['mib'] or 0:,.0f} MiB",
            safe_ratio(qtorch["mib"], qlib_result["mib"]),
            memory_target,
        )
        bench.add_row(
            f"{work.capitalize()} prepare of the full frame",
            format_seconds(qtorch["prepare_seconds"]),
            f"{qtorch['prepare_mib']:,.0f} MiB in addition",
            None,
            "",
        )


def measure_windows(bench: Bench) -> None:
    qtorch, qlib = bench.run_both("windows", threads=1, repeats=bench.args.repeats)
    if qtorch is None:
        return
    speed = qtorch["samples"] / qtorch["seconds"]
    qlib_speed = qlib["samples"] / qlib["seconds"] if qlib else None
    bench.add_row(
        "Random window batches, 20 x 20",
        f"{speed:,.0f}/s",
        f"Qlib {qlib_speed or 0:,.0f}/s",
        safe_ratio(speed, qlib_speed),
        ">= 30",
    )
    bench.add_row(
        "The same, compared with a bare index gather",
        f"{speed:,.0f}/s",
        f"bare {format_rate(qtorch['samples'], qtorch['bare'])}",
        qtorch["bare"] / qtorch["seconds"],
        ">= 0.8",
    )
    bench.add_row(
        "The same, compared with index_select of whole windows",
        f"{speed:,.0f}/s",
        f"index_select {format_rate(qtorch['samples'], qtorch['select'])}",
        qtorch["select"] / qtorch["seconds"],
        "none",
    )


def measure_lstm(bench: Bench) -> None:
    qtorch, qlib = bench.run_both("lstm", threads=1, repeats=3)
    if qtorch is None:
        return
    num_samples = qtorch["samples"]
    train = qtorch["train_seconds"]
    bench.add_row(
        "LSTM fit, train pass",
        format_rate(num_samples, train),
        f"hand-written {format_rate(num_samples, qtorch['hand'])}",
        qtorch["hand"] / train,
        ">= 0.95",
    )
    epoch = qlib and qlib["epoch"]
    bench.add_row(
        "LSTM fit, whole epoch",
        format_seconds(qtorch["epoch_seconds"]),
        "Qlib " + format_seconds(epoch),
        safe_ratio(epoch, qtorch["epoch_seconds"]),
        ">= 1.7",
    )
    num_test_samples = qtorch["test_samples"]
    bench.add_row(
        "LSTM predict, test segment",
        format_rate(num_test_samples, qtorch["predict"]),
        f"ready tensors {format_rate(num_test_samples, qtorch['infer'])}",
        qtorch["infer"] / qtorch["predict"],
        ">= 0.9",
    )
    predict = qlib and qlib["predict"]
    bench.add_row(
        "LSTM predict, test segment",
        format_seconds(qtorch["predict"]),
        "Qlib " + format_seconds(predict),
        safe_ratio(predict, qtorch["predict"]),
        "none",
    )


def measure_mlp(bench: Bench) -> None:
    qtorch = bench.run_qtorch("mlp", threads=1, repeats=4)
    if qtorch is None:
        return
    num_samples, train = qtorch["samples"], qtorch["train_seconds"]
    step = 1000 * qtorch["hand"] / (num_samples / 800)
    name = f"MLP fit, a step of {step:.2f} ms, inner_steps auto ({qtorch['inner_steps']})"
    bench.add_row(
        name,
        format_rate(num_samples, train),
        f"hand-written {format_rate(num_samples, qtorch['hand'])}",
        qtorch["hand"] / train,
        ">= 0.85",
    )


def measure_networks(bench: Bench) -> None:
    """Compare whole epochs with Qlib's classes, and train passes with a hand-written loop.

    An epoch of qtorch is the train pass and the valid segment; Qlib's `fit` evaluates the train
    segment as well, for its metric.
    """
    for name in NETWORKS:
        qtorch = bench.run("network_side", name, threads=1, repeats=3)
        if qtorch is None:
            continue
        step = 1000 * qtorch["hand_step"]
        title = f"{name} fit, {qtorch['instruments']} instruments, {qtorch['days']} days"
        bench.add_row(
            f"{title}, train pass, a step of {step:.0f} ms",
            f"{qtorch['train_rate']:,.0f}/s",
            f"hand-written {qtorch['hand_rate']:,.0f}/s",
            qtorch["share"],
            ">= 0.95" if step >= 20 else ">= 0.85",
        )
        qlib = bench.run("zoo_qlib", qtorch["job"], threads=1)
        epoch_rate, qlib_rate = qtorch["epoch_rate"], qlib and qlib["epoch_rate"]
        bench.add_row(
            f"{title}, whole epoch",
            f"{epoch_rate:,.0f}/s",
            f"Qlib {qlib_rate or 0:,.0f}/s",
            safe_ratio(epoch_rate, qlib_rate),
            "none",
        )


def measure_trainer(bench: Bench) -> None:
    qtorch, qlib = bench.run_both("trainer", threads=1)
    if qtorch is None:
        return
    overhead = qtorch["task"] - qtorch["bare"]
    qlib_overhead = qlib["task"] - qlib["bare"] if qlib else None
    bench.add_row(
        "TrainerR, overhead per tiny task, sqlite",
        format_seconds(overhead),
        "Qlib " + format_seconds(qlib_overhead),
        safe_ratio(qlib_overhead, overhead),
        ">= 1",
    )


def measure_pooled_trainer(bench: Bench) -> None:
    result = bench.run("pooled_side", "pooled", threads=1)
    if result is None:
        return
    pooled_seconds, local_seconds = result["pooled"], result["here"]
    bench.add_row(
        "TrainerRM, a tiny training, sqlite",
        format_seconds(pooled_seconds),
        "TrainerR " + format_seconds(local_seconds),
        1 / result["ratio"],
        ">= 0.95",
    )


def measure_pool(bench: Bench) -> None:
    for store, name, targets in (
        ("sqlite", "SQLite", {"1": 300, "8": 300}),
        ("postgres", "PostgreSQL", {"8": 500}),
        ("mongo", "MongoDB's wire (SecantusDB)", {}),
    ):
        options = (
            {"tasks": 50} if store == "mongo" else {}
        )  # this server is made for tests, not speed
        result = bench.run("pool_side", store, threads=1, **options)
        for workers, rate in result[store].items() if result else ():
            target = targets.get(workers)
            bench.add_row(
                f"Pool on {name}, claim and commit, {workers} workers",
                f"{rate:,.0f}/s",
                "target " + (f"{target}/s" if target else "-"),
                safe_ratio(rate, target),
                ">= 1" if target else "-",
            )


def measure_rolling(bench: Bench) -> None:
    result = bench.run("rolling_side", "rolling", threads=bench.args.threads)
    if result is None:
        return
    bench.add_row(
        f"Rolling study, {result['windows']} windows, Alpha158, shared features",
        format_seconds(result["shared"]),
        f"not shared {format_seconds(result['own'])}",
        result["ratio"],
        ">= 3",
    )


def measure_sweep(bench: Bench) -> None:
    result = bench.run("sweep_side", "sweep", threads=1)
    if result is None:
        return
    bench.add_row(
        "Overhead of a sweep's job over a bare run, tiny task, in seconds",
        format_seconds(result["job"]),
        f"bare {format_seconds(result['bare'])}",
        result["overhead"],
        "< 1.5",
    )


def measure_fleet(bench: Bench) -> None:
    works = {
        "small_mlp": ("20 seeds of an MLP with small steps", ">= 4"),
        "dlinear": ("20 seeds of DLinear", "none"),
        "lstm_800": ("8 seeds of an LSTM of two layers, batch 800", ">= 0.9"),
        "lstm_100": ("8 seeds of the same, batch 100", ">= 1.5"),
        "stockmixer": ("8 seeds of StockMixer", "none"),
        "rolling": ("windows of a small GRU", ">= 2"),
    }
    for work, (name, target) in works.items():
        result = bench.run("fleet_side", work, threads=1)
        if result is None:
            continue
        fleet, serial = result["fleet_processor"], result["serial_processor"]
        bench.add_row(
            f"Fleet: {name}, with runs and records",
            format_seconds(fleet),
            f"one after another {format_seconds(serial)}",
            safe_ratio(serial, fleet),
            target,
        )


def measure_resume(bench: Bench) -> None:
    result = bench.run("resume_side", "resume", threads=1)
    if result is None:
        return
    share = result["with"] / result["without"]
    bench.add_row(
        f"MLP, {result['epochs']} epochs with a checkpoint after each",
        format_seconds(result["with"]),
        f"without {format_seconds(result['without'])}",
        share,
        "<= 1.03",
    )
    bench.add_row(
        "From fit to the first batch, resumed from a checkpoint",
        format_seconds(result["resumed"]),
        f"a fresh fit {format_seconds(result['fresh'])}",
        None,
        "none",
    )


def measure_backtests(bench: Bench) -> None:
    qtorch = bench.run("backtest_side", "backtest", threads=1)
    qlib = bench.run_qlib("backtest", threads=1)
    if qtorch is None:
        return
    qlib_result = qlib or {"seconds": None, "mib": None}
    name = "Backtest of 23 months, 500 instruments, topk 50"
    bench.add_row(
        name,
        f"{qtorch['one']:.3g} s, {qtorch['one_mib']:,.0f} MiB",
        f"Qlib {format_seconds(qlib_result['seconds'])}, {qlib_result['mib'] or 0:,.0f} MiB",
        safe_ratio(qlib_result["seconds"], qtorch["one"]),
        ">= 50",
    )
    bench.add_row(
        "Backtest of 64 score columns in one pass",
        f"{qtorch['many']:.3g} s, {qtorch['many_mib']:,.0f} MiB",
        f"64 single passes {format_seconds(qtorch['singles'])}",
        safe_ratio(qtorch["singles"], qtorch["many"]),
        ">= 12",
    )
    bench.add_row(
        "Audit of the backtest, as a share of a single pass",
        format_seconds(qtorch["audit"]),
        f"single pass {format_seconds(qtorch['one'])}",
        qtorch["audit"] / qtorch["one"],
        "<= 0.1",
    )


MEASUREMENTS = {
    "features": measure_features,
    "alpha101": measure_alpha101,
    "handlers": measure_handlers,
    "windows": measure_windows,
    "lstm": measure_lstm,
    "mlp": measure_mlp,
    "networks": measure_networks,
    "trainer": measure_trainer,
    "pool": measure_pool,
    "pooled": measure_pooled_trainer,
    "rolling": measure_rolling,
    "sweep": measure_sweep,
    "fleet": measure_fleet,
    "resume": measure_resume,
    "backtests": measure_backtests,
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
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of qtorch and Qlib")
    parser.add_argument(
        "--only", default=",".join(MEASUREMENTS), help="names of measurements, separated by commas"
    )
    parser.add_argument("--json", help="write the raw results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for name in args.only.split(","):
            MEASUREMENTS[name](bench)
    print(f"\nMeasured on {device_name()}.\n")
    print("| measurement | qtorch | compared with | ratio | target |\n|---|---|---|---|---|")
    for row in bench.rows:
        print("| " + " | ".join(row) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(bench.raw, indent=1))


if __name__ == "__main__":
    main()
