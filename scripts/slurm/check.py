"""What `scripts/slurm_check.sh` tries: qtorch's commands on a cluster that loses jobs and nodes.

python scripts/slurm/check.py [FOLDER OF BARS IN QLIB'S LAYOUT]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cluster import Cluster

from qtorch.study.sweep import JOB_TAG

GOING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
PATIENCE = 600.0
PAGE = Path(__file__).resolve().parents[1] / "from_laptop_to_cluster.md"
USUAL = "sweep,devices,array,requeued"
TINY = ["debug=tiny", "model.network.hidden_size=16", "model.network.num_layers=1"]
REAL = [
    "data=qlib",
    "universe=nyse500",
    "dataset.step_len=5",
    "segments.train=[2014-01-01,2014-06-30]",
    "segments.valid=[2015-01-01,2015-02-28]",
    "segments.test=[2016-01-01,2016-02-29]",
    "trainer.accelerator=cpu",
    "+trainer.limit_train_batches=10",
]
COMMON = [
    "callbacks=no_stop",
    "log_level=WARNING",
    "model.checkpoint.every_n_steps=2",
    "model.inner_steps=2",
]
LAUNCHER = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.timeout_min=30",
]


class Check:
    """The commands of a user in a folder that all nodes see."""

    def __init__(self, cluster: Cluster, folder: Path, market: list[str], epochs: int) -> None:
        self.cluster, self.folder = cluster, folder
        self.epochs = epochs
        self.job = [*market, *COMMON, f"trainer.max_epochs={epochs}"]
        self.uri = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
        self.environment = {
            **cluster.environment,
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": self.uri,
            "QTORCH_CACHE": str(folder / "cache"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        os.environ["MLFLOW_TRACKING_URI"] = self.uri
        self.one = ["model=gru"]  # the job that is trained in several ways
        self.rows: list[tuple[str, str, bool]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command that runs beside this; its output goes into `commands.log`."""
        with (self.folder / "commands.log").open("a") as log:
            print("$", *command, file=log, flush=True)
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
            )

    def call(self, *command: str) -> int:
        """A command and its exit code."""
        print("  $", " ".join(command), file=sys.stderr, flush=True)
        return self.start(*command).wait(PATIENCE)

    def note(self, what: str, told: str, held: bool) -> None:
        """A row of the table."""
        self.rows.append((what, told, held))
        print(f"  {'ok ' if held else 'NOT'} {what}: {told}", file=sys.stderr, flush=True)

    def runs(self, experiment: str) -> list[Any]:
        """The runs of an experiment that are jobs: those with a task."""
        from qtorch import R

        try:
            found = R.list_recorders(experiment_name=experiment).values()
        except Exception:  # no such experiment yet
            return []
        return [r for r in found if "hostname" in r.list_tags()]  # no sweep's own

    def last_sent(self) -> str:
        """The newest job of sbatch that a command has told of."""
        log = (self.folder / "commands.log").read_text()
        return str(re.findall(r"^Submitted batch job (\d+)", log, re.MULTILINE)[-1])

    def submissions(self) -> int:
        """How many jobs submitit has sent to SLURM."""
        return len(list(self.folder.rglob("*_submitted.pkl")))

    def undisturbed(self) -> Any:
        """The run of the one job, trained here and in one go."""
        if not self.runs("alone"):
            self.call("qtorch", "train", *self.job, *self.one, "experiment_name=alone")
        return self.runs("alone")[0]


def until(
    condition: Callable[[], Any], what: str, command: subprocess.Popen[str] | None = None
) -> Any:
    """Wait for it; in vain once the command that would bring it has ended."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if command is not None and command.poll() is not None:
            raise RuntimeError(f"waited for {what}, but the command ended: {command.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.5)  # looking takes a core from those who are looked at
    return found


def epochs_of(run: Any) -> set[int]:
    """The epochs whose metrics a run has."""
    return set(run.logged("valid/loss")) if "valid/loss" in run.list_metrics() else set()


def history(run: Any) -> dict[str, Any]:
    """All metrics of a run, step by step."""
    return {name: run.logged(name) for name in sorted(run.list_metrics())}


def number_of(run: Any) -> int:
    """A run's number in its sweep: under submitit that in the array of jobs too."""
    tags = run.list_tags()
    return int(json.loads(next(v for k, v in tags.items() if k.startswith(JOB_TAG)))["number"])


def resumed_from(run: Any) -> str | None:
    """The checkpoint from which a run's training went on at last."""
    return run.load_object("fit_report")["resumed_from"]  # type: ignore[no-any-return]  # or None


def in_training(check: Check, experiment: str) -> set[int]:
    """The jobs that are well in their training, and not about to end it."""
    busy = [r for r in check.runs(experiment) if r.status == "RUNNING"]
    return {number_of(r) for r in busy if 0 < len(epochs_of(r)) < 0.6 * check.epochs}


def busy_on(
    check: Check, node: str, experiment: str, least: int = 1
) -> tuple[list[int], set[int]] | None:
    """The jobs on a node, and those of all nodes in mid-training, once `least` are both."""
    busy = in_training(check, experiment)
    jobs = [int(k) for k in check.cluster.jobs("%K", "-w", node)]
    return (jobs, busy) if len(busy.intersection(jobs)) >= least else None


def disturbed(check: Check, name: str, words: list[str]) -> tuple[set[int], set[int]]:
    """The sweep loses jobs in four ways; which ran then, and which of them had a checkpoint.

    One is cancelled before it begins and one in mid-training, those of a node are preempted, those
    of the other are lost with it.
    """
    cluster = check.cluster
    command = check.start("qtorch", "train", "-m", *LAUNCHER, f"sweep.name={name}", *words)
    first, busy = until(lambda: busy_on(check, "one", name, 2), "jobs in training", command)
    array, waiting = cluster.jobs("%F")[0], cluster.jobs("%K", "-r", "-t", "PENDING")
    cluster.run("scancel", f"{array}_{waiting[0]}")
    urgent = ["--partition=urgent", "--nodelist=one", "--exclusive", "--output=/dev/null"]
    told = cluster.run("sbatch", "--parsable", *urgent, "--wrap=true").strip()
    second, others = until(lambda: busy_on(check, "two", name), "jobs in training on two", command)
    victim = min(others.intersection(second))
    cluster.run("scancel", f"{array}_{victim}")
    until(lambda: "COMPLETED" in cluster.state(told), "the urgent job's end", command)
    hit = {k for k in first if cluster.told(f"{array}_{k}")["Restarts"] == "1"}
    kept = {*busy.intersection(hit), victim}
    check.note("preempted jobs queued again", f"{len(hit)} of {len(first)}", hit == set(first))
    second, busy = until(lambda: busy_on(check, "two", name), "jobs on two again", command)
    count = cluster.kill_node("two")
    cut = {number_of(r) for r in check.runs(name) if r.status == "RUNNING"}.intersection(second)
    code = command.wait(PATIENCE)
    check.note("jobs cancelled, a node killed", f"{count} processes; exit code {code}", code != 0)
    lost = f"job {array}_{waiting[0]} of slurm: it has ended without a result"
    found = lost in (check.folder / "commands.log").read_text()
    check.note("one cancelled before it began is a failed job", lost if found else "", found)
    cluster.start_node("two")
    return {*hit, *cut, victim}, kept.union(busy.intersection(cut))


def sweep(check: Check, jobs: int) -> None:
    """A sweep that loses jobs and a node, and is resumed."""
    name = "study"
    seeds = f"seed=range({jobs // 2})"
    words = [*check.job, f"experiment_name={name}", "model=lstm,gru", seeds]
    hit, kept = disturbed(check, name, words)
    done = [r for r in check.runs(name) if r.status == "FINISHED"]
    before = {r.id: (history(r), r.end_time) for r in done}
    asked = check.submissions()
    code = check.call("qtorch", "sweep", "resume", name)
    runs = check.runs(name)
    finished = [r for r in runs if r.status == "FINISHED"]
    check.note(
        "the sweep resumed",
        f"exit code {code}; {len(finished)} of {jobs} jobs finished, {len(runs)} runs",
        code == 0 and len(finished) == len(runs) == jobs,
    )
    asked = check.submissions() - asked
    what = "the cluster asked for what was left alone"
    check.note(what, f"{asked} sent to the queue", asked == jobs - len(done))
    after = {r.id: (history(r), r.end_time) for r in runs if r.id in before}
    check.note("no finished job repeated", f"{len(before)} were, untouched", after == before)
    resumed = {
        number_of(r): r for r in finished if r.load_object("fit_report")["resumed_from"] is not None
    }
    check.note(
        "interrupted jobs went on from their checkpoints",
        f"{sorted(resumed)}, of {sorted(hit)} that were; with a checkpoint {sorted(kept)}",
        len(kept) > 1 and kept <= set(resumed) <= hit,
    )
    run = resumed[max(resumed)]  # rather a GRU
    task = run.load_object("task")
    model = "gru" if "GRU" in str(task["model"]["network"]) else "lstm"
    check.one = [f"model={model}", f"seed={task['seed']}"]
    equal = history(check.undisturbed()) == history(run)
    check.note("... as if nothing had been", "metrics equal to an undisturbed run's", equal)


def devices(check: Check) -> None:
    """Two processes train one network, by srun on one node, by a sweep's job on both."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    sweep = ["qtorch", "train", "-m", *LAUNCHER, "hydra.launcher.nodes=2"]
    ways = {
        "by srun, two processes on one node": [
            *["srun", "--ntasks=2", "--nodes=1", "qtorch", "train", *ddp],
            *["trainer.devices=2", "experiment_name=ddp-srun"],
        ],
        "in a sweep's job, one process on each node": [
            *[*sweep, *ddp, "trainer.devices=1", "trainer.num_nodes=2"],
            *["experiment_name=ddp-nodes"],
        ],
    }
    single = check.undisturbed()
    for what, command in ways.items():
        code = check.call(*command, *check.job, *check.one)
        found = check.runs(command[-1].partition("=")[2])
        worst = max(
            (
                abs(value - single.logged(key)[step])
                for key in ("train/loss", "valid/loss", "valid/rank_ic")
                for step, value in (found[0].logged(key) if found else {}).items()
            ),
            default=float("inf"),
        )
        check.note(
            f"DDP {what}",
            f"exit code {code}, {len(found)} run; metrics within {worst:.1e} of one device's",
            code == 0 and len(found) == 1 and worst < 1e-3,
        )


def array(check: Check) -> None:
    """Workers of a pool as an array; one of them is cancelled in mid-training."""
    from qtorch.task.manager import TaskManager

    name, url = "pool", f"sqlite:///{check.folder / 'tasks.db'}"
    words = [*check.job, "model=gru", f"experiment_name={name}", "seed=0,1,2,3"]
    check.call(
        "qtorch", "train", "-m", "runner=rm", f"url={url}", "pool=pool", "wait=false", *words
    )
    worker = f"srun qtorch worker pool=pool url={url} lease=10 idle_timeout=15 table=false"
    told = check.cluster.run(
        "sbatch", "--parsable", "--array=0-2", "--cpus-per-task=1", "--signal=TERM@60",
        f"--chdir={check.folder}", f"--export=ALL,PATH={check.environment['PATH']}",
        *[f"--output={check.folder}/worker-%a.log"], f"--wrap={worker}",
    )  # fmt: skip
    until(lambda: check.runs(name), "a worker's first run")
    check.cluster.run("scancel", f"{told.strip()}_0")
    code = check.call("qtorch", "tasks", "wait", "pool=pool", f"url={url}")
    manager = TaskManager("pool", url)
    states, runs = manager.task_stat(), check.runs(name) or []
    manager.close()
    check.note(
        "pool workers as an array, one cancelled",
        f"exit code {code}; {dict(states)}; {len(runs)} runs",
        code == 0 and states.get("done") == 4,
    )


def requeued(check: Check) -> None:
    """A job that gets SIGUSR1 keeps a checkpoint, is queued again, and goes on in its run."""
    name = "requeued"
    words = [*check.job, *check.one, f"experiment_name={name}"]
    job = check.cluster.run(
        "sbatch", "--parsable", "--requeue", "--signal=B:USR1@60", f"--chdir={check.folder}",
        f"--export=ALL,PATH={check.environment['PATH']}", f"--output={check.folder}/requeued.log",
        "--open-mode=append", f"--wrap=exec qtorch train {' '.join(map(repr, words))}",
    ).strip()  # fmt: skip
    until(lambda: any(epochs_of(r) for r in check.runs(name)), "the first epoch")
    check.cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: any(r.status == "KILLED" for r in check.runs(name)), "the run's end")
    until(lambda: any(r.status == "FINISHED" for r in check.runs(name)), "the job's second part")
    (run,) = check.runs(name)
    resumed = resumed_from(run)
    equal = history(run) == history(check.undisturbed())
    check.note(
        "SIGUSR1: a checkpoint, queued again, the same run",
        f"went on from {Path(str(resumed)).name}, metrics equal to an undisturbed run's: {equal}",
        resumed is not None and equal,
    )


def page(check: Check) -> None:
    """Every command of the page, as it stands there, one after another."""
    text = PAGE.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        sent: dict[str, str] = {}
        for command in block.replace("\\\n", " ").splitlines():
            own_ray = "address=auto" in command
            if own_ray:
                check.call(
                    *["ray", "start", "--head", "--num-cpus", "2", "--include-dashboard=false"]
                )
            if "RUN_ID" in command:
                done = [r for r in check.runs("debug") if r.status == "FINISHED"]
                command = command.replace("RUN_ID", str(done[0].id))
            told = f"`{' '.join(command.split())[:60]}`"
            code = check.call("bash", "-c", command)
            if own_ray:
                check.call("ray", "stop", "--force")
            if command.startswith("sbatch") and code == 0:
                sent[told] = check.last_sent()
            else:
                check.note(told, f"exit code {code}", code == 0)
        for told, job in sent.items():  # at the block's end: it may be what they wait for
            until(lambda: not check.cluster.state(job) & GOING, f"the end of job {job}")  # noqa: B023
            states = check.cluster.state(job)
            check.note(told, f"job {job}: {', '.join(sorted(states))}", states == {"COMPLETED"})


CHECKS: dict[str, Callable[[Check], None]] = {
    "devices": devices,
    "array": array,
    "requeued": requeued,
    "page": page,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("provider", nargs="?", help="bars in Qlib's layout, with nyse500")
    parser.add_argument("--jobs", type=int, default=12, help="jobs of the sweep")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", default=USUAL, help=f"checks, by comma: {USUAL},page")
    parser.add_argument("--keep", help="a folder for what the check leaves, instead of none")
    parser.add_argument("--json", help="a file for the table's rows")
    args = parser.parse_args()
    market = TINY
    if args.provider:
        market = [*REAL, f"data.provider_uri={Path(args.provider).resolve()}"]
    with tempfile.TemporaryDirectory(prefix="qtorch-slurm-", ignore_cleanup_errors=True) as made:
        folder = Path(args.keep or made).resolve()
        (folder / "slurm").mkdir(parents=True)
        with Cluster(folder / "slurm") as cluster:
            check = Check(cluster, folder, market, args.epochs)
            for name in args.only.split(","):
                print(f"{name}:", file=sys.stderr)
                begin = time.monotonic()
                try:
                    sweep(check, args.jobs) if name == "sweep" else CHECKS[name](check)
                except Exception as error:
                    check.note(name, f"{type(error).__name__}: {error}", False)
                print(f"  {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if not all(held for _, _, held in check.rows):
            print((folder / "commands.log").read_text()[-8000:], file=sys.stderr)
    print(f"\n| on SLURM {'(real bars)' if args.provider else ''} | seen | held |\n|---|---|---|")
    for what, told, held in check.rows:
        print(f"| {what} | {told} | {'yes' if held else 'NO'} |")
    if args.json:
        Path(args.json).write_text(json.dumps(check.rows))
    return int(not all(held for _, _, held in check.rows))


if __name__ == "__main__":
    sys.exit(main())
