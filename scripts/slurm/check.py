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
        time.sleep(0.3)
    return found


def epochs_of(run: Any) -> set[int]:
    """The epochs whose metrics a run has."""
    return set(run.logged("valid/loss")) if "valid/loss" in run.list_metrics() else set()


def history(run: Any) -> dict[str, Any]:
    """All metrics of a run, step by step."""
    return {name: run.logged(name) for name in sorted(run.list_metrics())}


def training_jobs(check: Check, node: str, experiment: str) -> list[str]:
    """SLURM's running jobs on a node, once one of the runs is in mid-training."""
    busy = [r for r in check.runs(experiment) if r.status == "RUNNING" and epochs_of(r)]
    return check.cluster.jobs("%i", "-w", node) if len(busy) > 2 else []


def submissions(check: Check) -> list[Path]:
    """What submitit has sent to SLURM: a file for each job."""
    return list(check.folder.rglob("*_submitted.pkl"))


def sweep(check: Check, jobs: int) -> None:
    """A sweep that loses one job to scancel and a node to kill -9, and is resumed."""
    cluster, name = check.cluster, "study"
    seeds = ",".join(str(k) for k in range(jobs // 2))
    words = [*check.job, f"experiment_name={name}", "model=lstm,gru", f"seed={seeds}"]
    command = check.start("qtorch", "train", "-m", *LAUNCHER, f"sweep.name={name}", *words)
    victim = until(lambda: training_jobs(check, "one", name), "jobs in mid-training", command)[0]
    cluster.run("scancel", victim)
    until(lambda: training_jobs(check, "two", name), "jobs in training on the other node", command)
    count = cluster.kill_node("two")
    code = command.wait(PATIENCE)
    check.note("a job cancelled, a node killed", f"{count} processes; exit code {code}", code != 0)
    cluster.start_node("two")
    done = [r for r in check.runs(name) if r.status == "FINISHED"]
    before = {r.id: (history(r), r.end_time) for r in done}
    asked = len(submissions(check))
    code = check.call("qtorch", "sweep", "resume", name)
    runs = check.runs(name)
    finished = [r for r in runs if r.status == "FINISHED"]
    check.note(
        "the sweep resumed",
        f"exit code {code}; {len(finished)} of {jobs} jobs finished, {len(runs)} runs",
        code == 0 and len(finished) == len(runs) == jobs,
    )
    asked = len(submissions(check)) - asked
    told = f"{asked} sent to the queue"
    check.note("the cluster asked for what was left alone", told, asked == jobs - len(done))
    after = {r.id: (history(r), r.end_time) for r in runs if r.id in before}
    check.note("no finished job repeated", f"{len(before)} were, untouched", after == before)
    resumed = [r for r in finished if r.load_object("fit_report")["resumed_from"] is not None]
    told = f"{len(resumed)} of them"
    check.note("interrupted jobs went on from their checkpoints", told, len(resumed) >= 2)
    task, alone = resumed[0].load_object("task"), f"{name}-alone"
    model = "gru" if "GRU" in str(task["model"]["network"]) else "lstm"
    words = [*check.job, f"experiment_name={alone}", f"model={model}", f"seed={task['seed']}"]
    check.call("qtorch", "train", *words)
    equal = history(check.runs(alone)[0]) == history(resumed[0])
    check.note("... as if nothing had been", "metrics equal to an undisturbed run's", equal)


def devices(check: Check) -> None:
    """Two processes train one network, started by srun."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    ways: dict[str, tuple[list[str], list[str]]] = {
        "one": ([], []),
        "srun": (["srun", "--ntasks=2", "--nodes=1"], [*ddp, "trainer.devices=2"]),
        "nodes": (
            ["srun", "--ntasks=2", "--nodes=2"],
            [*ddp, "trainer.devices=1", "trainer.num_nodes=2"],
        ),
    }
    for name, (head, options) in ways.items():
        words = [*check.job, *options, "model=gru", f"experiment_name=ddp-{name}"]
        code = check.call(*head, "qtorch", "train", *words)
        found = check.runs(f"ddp-{name}")
        single = check.runs("ddp-one")[0]
        worst = max(
            (
                abs(value - single.logged(key)[step])
                for key in ("train/loss", "valid/loss", "valid/rank_ic")
                for step, value in (found[0].logged(key) if found else {}).items()
            ),
            default=float("inf"),
        )
        if name != "one":
            what = "two processes on one node" if name == "srun" else "one process on each node"
            check.note(
                f"DDP by srun, {what}",
                f"exit code {code}, {len(found)} run; metrics within {worst:.1e} of one device's",
                code == 0 and len(found) == 1 and worst < 1e-3,
            )


def array(check: Check) -> None:
    """Workers of a pool as an array; one of them is cancelled in mid-training."""
    from qtorch.task.manager import TaskManager

    name, url = "pool", f"sqlite:///{check.folder / 'tasks.db'}"
    words = [*check.job, "model=gru", f"experiment_name={name}", "seed=0,1,2,3,4,5"]
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
        code == 0 and states.get("done") == 6,
    )


def requeued(check: Check) -> None:
    """A job that gets SIGUSR1 keeps a checkpoint, is queued again, and goes on in its run."""
    name = "requeued"
    words = [*check.job, "model=gru", f"experiment_name={name}"]
    job = check.cluster.run(
        "sbatch", "--parsable", "--requeue", "--signal=B:USR1@60", f"--chdir={check.folder}",
        f"--export=ALL,PATH={check.environment['PATH']}", f"--output={check.folder}/requeued.log",
        "--open-mode=append", f"--wrap=exec qtorch train {' '.join(map(quoted, words))}",
    ).strip()  # fmt: skip
    until(lambda: any(epochs_of(r) for r in check.runs(name)), "the first epoch")
    check.cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: any(r.status == "KILLED" for r in check.runs(name)), "the run's end")
    until(lambda: any(r.status == "FINISHED" for r in check.runs(name)), "the job's second part")
    (run,) = check.runs(name)
    resumed = run.load_object("fit_report")["resumed_from"]
    single = check.runs("ddp-one")
    equal = bool(single) and history(run) == history(single[0])
    check.note(
        "SIGUSR1: a checkpoint, queued again, the same run",
        f"went on from {Path(str(resumed)).name}, metrics equal to an undisturbed run's: {equal}",
        resumed is not None and equal,
    )


def page(check: Check) -> None:
    """Every command of the page, as it stands there, one after another."""
    text = PAGE.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for command in block.replace("\\\n", " ").splitlines():
            own_ray = "address=auto" in command
            if own_ray:
                check.call(
                    *["ray", "start", "--head", "--num-cpus", "2", "--include-dashboard=false"]
                )
            if "RUN_ID" in command:
                done = [r for r in check.runs("debug") if r.status == "FINISHED"]
                command = command.replace("RUN_ID", str(done[0].id))
            code = check.call("bash", "-c", command)
            if command.startswith("sbatch") and "worker" not in command:
                until(lambda: not check.cluster.jobs(), "the job's end")
            if own_ray:
                check.call("ray", "stop", "--force")
            check.note(f"`{' '.join(command.split())[:60]}`", f"exit code {code}", code == 0)


def quoted(word: str) -> str:
    return f"'{word}'"


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
                try:
                    sweep(check, args.jobs) if name == "sweep" else CHECKS[name](check)
                except Exception as error:
                    check.note(name, f"{type(error).__name__}: {error}", False)
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
