"""Check qtorch's commands on a SLURM cluster that loses jobs and nodes (scripts/slurm_check.sh).

python scripts/slurm/check.py [FOLDER WITH BARS IN QLIB'S LAYOUT]
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

ACTIVE_STATES = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
TIMEOUT = 600.0
PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeps-and-clusters.md"
DEFAULT_CHECKS = "sweep,devices,array,requeued"
SYNTHETIC_DATA = ["debug=tiny", "model.network.hidden_size=16", "model.network.num_layers=1"]
QLIB_DATA = [
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
    """Runs the commands of a user in a folder that all nodes share, and collects the results."""

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
        self.reference_job = ["model=gru"]  # overrides of the job that several checks train
        self.rows: list[tuple[str, str, bool]] = []

    def start_command(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the background; its output goes to `commands.log`."""
        with (self.folder / "commands.log").open("a") as log:
            print("$", *command, file=log, flush=True)
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
            )

    def run_command(self, *command: str) -> int:
        """Run a command and return its exit code."""
        print("  $", " ".join(command), file=sys.stderr, flush=True)
        return self.start_command(*command).wait(TIMEOUT)

    def add_row(self, name: str, details: str, has_passed: bool) -> None:
        """Add a row to the table and print it."""
        self.rows.append((name, details, has_passed))
        print(
            f"  {'ok    ' if has_passed else 'FAILED'} {name}: {details}",
            file=sys.stderr,
            flush=True,
        )

    def runs(self, experiment: str) -> list[Any]:
        """List the runs of the jobs in an experiment."""
        from qtorch import R

        try:
            recorders = R.list_recorders(experiment_name=experiment).values()
        except Exception:  # the experiment does not exist yet
            return []
        return [r for r in recorders if "hostname" in r.list_tags()]  # not a sweep's own run

    def last_job_id(self) -> str:
        """Return the ID of the last job that sbatch has submitted."""
        log = (self.folder / "commands.log").read_text()
        return str(re.findall(r"^Submitted batch job (\d+)", log, re.MULTILINE)[-1])

    def num_submissions(self) -> int:
        """Count the jobs that submitit has submitted to SLURM."""
        return len(list(self.folder.rglob("*_submitted.pkl")))

    def reference_run(self) -> Any:
        """Return the run of the reference job, trained outside SLURM and without interruption."""
        if not self.runs("reference"):
            self.run_command(
                "qtorch", "train", *self.job, *self.reference_job, "experiment_name=reference"
            )
        return self.runs("reference")[0]


def wait_until(
    condition: Callable[[], Any], description: str, command: subprocess.Popen[str] | None = None
) -> Any:
    """Wait until a condition holds and return its value; fail if `command` ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        if command is not None and command.poll() is not None:
            raise RuntimeError(
                f"the command exited with code {command.returncode} while waiting for {description}"
            )
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out while waiting for {description}")
        time.sleep(0.5)  # polling more often would take CPU time from the jobs
    return value


def epochs_with_metrics(run: Any) -> set[int]:
    """Return the epochs for which a run has metrics."""
    return set(run.metric_history("valid/loss")) if "valid/loss" in run.list_metrics() else set()


def metric_histories(run: Any) -> dict[str, Any]:
    """Return the history of all metrics of a run."""
    return {name: run.metric_history(name) for name in sorted(run.list_metrics())}


def job_number(run: Any) -> int:
    """Return a run's job number in its sweep; submitit's job array uses the same numbers."""
    tags = run.list_tags()
    return int(json.loads(next(v for k, v in tags.items() if k.startswith(JOB_TAG)))["number"])


def last_checkpoint(run: Any) -> str | None:
    """Return the checkpoint from which a run's training was last resumed."""
    return run.load_object("fit_report")["resumed_from"]  # type: ignore[no-any-return]


def training_jobs(check: Check, experiment: str) -> set[int]:
    """Return the jobs in the middle of their training: some epochs done, but not about to end."""
    busy = [r for r in check.runs(experiment) if r.status == "RUNNING"]
    return {job_number(r) for r in busy if 0 < len(epochs_with_metrics(r)) < 0.6 * check.epochs}


def jobs_on_node(check: Check, node: str, experiment: str) -> tuple[list[int], set[int]] | None:
    """Return a node's jobs and all jobs in mid-training; None if it has none of the latter."""
    in_training = training_jobs(check, experiment)
    jobs = [int(k) for k in check.cluster.list_jobs("%K", "-w", node)]
    return (jobs, in_training) if in_training.intersection(jobs) else None


def disturb_sweep(check: Check, name: str, overrides: list[str]) -> tuple[set[int], set[int]]:
    """Run a sweep that loses jobs in four ways; return these jobs, and those with a checkpoint.

    One job is cancelled before it starts and one in mid-training; the job on one node is preempted,
    and the one on the other node is lost with the node.
    """
    cluster = check.cluster
    command = check.start_command(
        *["qtorch", "train", "-m", *LAUNCHER, "hydra.launcher.cpus_per_task=2"],  # one job a node
        *[f"sweep.name={name}", *overrides],
    )
    on_one, busy = wait_until(
        lambda: jobs_on_node(check, "one", name), "a job in training on node one", command
    )
    array, waiting = (
        cluster.list_jobs("%F")[0],
        cluster.list_jobs("%K", "-r", "-t", "PENDING"),
    )
    cluster.run("scancel", f"{array}_{waiting[0]}")
    urgent = ["--partition=urgent", "--nodelist=one", "--exclusive", "--output=/dev/null"]
    urgent_job = cluster.run("sbatch", "--parsable", *urgent, "--wrap=true").strip()
    on_two, busy_on_two = wait_until(
        lambda: jobs_on_node(check, "two", name), "jobs on node two", command
    )
    cancelled_job = min(busy_on_two.intersection(on_two))
    cluster.run("scancel", f"{array}_{cancelled_job}")
    wait_until(
        lambda: "COMPLETED" in cluster.job_states(urgent_job), "the end of the urgent job", command
    )
    requeued_jobs = {k for k in on_one if cluster.job_record(f"{array}_{k}")["Restarts"] == "1"}
    with_checkpoint = {*busy.intersection(requeued_jobs), cancelled_job}
    check.add_row(
        "preempted jobs were requeued",
        f"{len(requeued_jobs)} of {len(on_one)}",
        requeued_jobs == set(on_one),
    )
    on_two, busy = wait_until(
        lambda: jobs_on_node(check, "two", name), "jobs on node two again", command
    )
    num_processes = cluster.kill_node("two")
    node_jobs = {job_number(r) for r in check.runs(name) if r.status == "RUNNING"}.intersection(
        on_two
    )
    code = command.wait(TIMEOUT)
    check.add_row(
        "sweep with cancelled jobs and a killed node fails",
        f"killed {num_processes} processes; exit code {code}",
        code != 0,
    )
    message = f"job {array}_{waiting[0]} of slurm: the job ended without a result"
    is_reported = message in (check.folder / "commands.log").read_text()
    check.add_row(
        "a job cancelled before its start has failed", message if is_reported else "", is_reported
    )
    cluster.start_node("two")
    return {*requeued_jobs, *node_jobs, cancelled_job}, with_checkpoint.union(
        busy.intersection(node_jobs)
    )


def check_sweep(check: Check, jobs: int) -> None:
    """Check that a sweep that lost jobs and a node can be resumed."""
    name = "study"
    seeds = f"seed=range({jobs // 2})"
    overrides = [*check.job, f"experiment_name={name}", "model=lstm,gru", seeds]
    hit_jobs, with_checkpoint = disturb_sweep(check, name, overrides)
    finished_before = [r for r in check.runs(name) if r.status == "FINISHED"]
    before = {r.id: (metric_histories(r), r.end_time) for r in finished_before}
    num_submitted = check.num_submissions()
    code = check.run_command("qtorch", "sweep", "resume", name)
    runs = check.runs(name)
    finished_runs = [r for r in runs if r.status == "FINISHED"]
    check.add_row(
        "the sweep was resumed",
        f"exit code {code}; {len(finished_runs)} of {jobs} jobs finished, {len(runs)} runs",
        code == 0 and len(finished_runs) == len(runs) == jobs,
    )
    num_submitted = check.num_submissions() - num_submitted
    title = "only unfinished jobs were submitted"
    check.add_row(title, f"submitted {num_submitted}", num_submitted == jobs - len(finished_before))
    after = {r.id: (metric_histories(r), r.end_time) for r in runs if r.id in before}
    check.add_row("no finished job was repeated", f"{len(before)} finished before", after == before)
    resumed_runs = {
        job_number(r): r
        for r in finished_runs
        if r.load_object("fit_report")["resumed_from"] is not None
    }
    check.add_row(
        "interrupted jobs resumed from their checkpoints",
        f"resumed {sorted(resumed_runs)} of {sorted(hit_jobs)}; "
        f"with a checkpoint: {sorted(with_checkpoint)}",
        len(with_checkpoint) > 1 and with_checkpoint <= set(resumed_runs) <= hit_jobs,
    )
    run = resumed_runs[max(resumed_runs)]  # the highest numbers are GRU jobs
    task = run.load_object("task")
    model = "gru" if "GRU" in str(task["model"]["network"]) else "lstm"
    check.reference_job = [f"model={model}", f"seed={task['seed']}"]
    equal = metric_histories(check.reference_run()) == metric_histories(run)
    check.add_row("... with unchanged results", "metrics equal those of an undisturbed run", equal)


def check_devices(check: Check) -> None:
    """Check DDP with two processes: with srun on one node, and in a sweep's job on both nodes."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    sweep_command = ["qtorch", "train", "-m", *LAUNCHER, "hydra.launcher.nodes=2"]
    ways = {
        "with srun, two processes on one node": [
            *["srun", "--ntasks=2", "--nodes=1", "qtorch", "train", *ddp],
            *["trainer.devices=2", "experiment_name=ddp-srun"],
        ],
        "in a sweep's job, one process on each node": [
            *[*sweep_command, *ddp, "trainer.devices=1", "trainer.num_nodes=2"],
            *["experiment_name=ddp-nodes"],
        ],
    }
    reference = check.reference_run()
    for description, command in ways.items():
        code = check.run_command(*command, *check.job, *check.reference_job)
        runs = check.runs(command[-1].partition("=")[2])
        max_difference = max(
            (
                abs(value - reference.metric_history(key)[step])
                for key in ("train/loss", "valid/loss", "valid/rank_ic")
                for step, value in (runs[0].metric_history(key) if runs else {}).items()
            ),
            default=float("inf"),
        )
        check.add_row(
            f"DDP {description}",
            f"exit code {code}, {len(runs)} run(s); "
            f"metrics differ by at most {max_difference:.1e} from one device",
            code == 0 and len(runs) == 1 and max_difference < 1e-3,
        )


def check_worker_array(check: Check) -> None:
    """Check pool workers that run as a job array; one is cancelled in mid-training."""
    from qtorch.task.manager import TaskManager

    name, url = "pool", f"sqlite:///{check.folder / 'tasks.db'}"
    overrides = [*check.job, "model=gru", f"experiment_name={name}", "seed=0,1,2"]
    check.run_command(
        "qtorch", "train", "-m", "runner=rm", f"url={url}", "pool=pool", "wait=false", *overrides
    )
    worker = f"srun qtorch worker pool=pool url={url} lease=10 idle_timeout=15 table=false"
    array_job = check.cluster.run(
        "sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", "--signal=TERM@60",
        f"--chdir={check.folder}", f"--export=ALL,PATH={check.environment['PATH']}",
        *[f"--output={check.folder}/worker-%a.log"], f"--wrap={worker}",
    )  # fmt: skip
    wait_until(lambda: check.runs(name), "the first run of a worker")
    check.cluster.run("scancel", f"{array_job.strip()}_0")
    code = check.run_command("qtorch", "tasks", "wait", "pool=pool", f"url={url}")
    manager = TaskManager("pool", url)
    states, runs = manager.task_stat(), check.runs(name) or []
    manager.close()
    check.add_row(
        "pool workers as a job array, one cancelled",
        f"exit code {code}; {dict(states)}; {len(runs)} runs",
        code == 0 and states.get("done") == 3,
    )


def check_requeue(check: Check) -> None:
    """Check that a job with SIGUSR1 writes a checkpoint, is requeued, and resumes its run."""
    name = "requeued"
    overrides = [*check.job, *check.reference_job, f"experiment_name={name}"]
    job = check.cluster.run(
        "sbatch", "--parsable", "--requeue", "--signal=B:USR1@60", f"--chdir={check.folder}",
        f"--export=ALL,PATH={check.environment['PATH']}", f"--output={check.folder}/requeued.log",
        "--open-mode=append", f"--wrap=exec qtorch train {' '.join(map(repr, overrides))}",
    ).strip()  # fmt: skip
    wait_until(lambda: any(epochs_with_metrics(r) for r in check.runs(name)), "the first epoch")
    check.cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: any(r.status == "KILLED" for r in check.runs(name)), "the end of the run")
    wait_until(
        lambda: any(r.status == "FINISHED" for r in check.runs(name)), "the end of the resumed job"
    )
    (run,) = check.runs(name)
    checkpoint = last_checkpoint(run)
    is_equal = metric_histories(run) == metric_histories(check.reference_run())
    check.add_row(
        "SIGUSR1: checkpoint, requeue, resume in the same run",
        f"resumed from {Path(str(checkpoint)).name}; metrics equal an undisturbed run: {is_equal}",
        checkpoint is not None and is_equal,
    )


def page_blocks() -> list[str]:
    """Return the blocks of commands on the page, in order."""
    return re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)


def check_page(check: Check) -> None:
    """Run every command of the page unchanged, one after another."""
    for block in page_blocks():
        sbatch_jobs: dict[str, str] = {}
        for command in block.replace("\\\n", " ").splitlines():
            needs_ray = "address=auto" in command
            if needs_ray:
                check.run_command(
                    *["ray", "start", "--head", "--num-cpus", "2", "--include-dashboard=false"]
                )
            title = f"`{' '.join(command.split())[:60]}`"
            code = check.run_command("bash", "-c", command)
            if needs_ray:
                check.run_command("ray", "stop", "--force")
            if command.startswith("sbatch") and code == 0:
                sbatch_jobs[title] = check.last_job_id()
            else:
                check.add_row(title, f"exit code {code}", code == 0)
        # Wait after the block only: its commands may depend on each other.
        for title, job in sbatch_jobs.items():
            wait_until(
                lambda: not check.cluster.job_states(job) & ACTIVE_STATES,  # noqa: B023
                f"the end of job {job}",
            )
            states = check.cluster.job_states(job)
            check.add_row(title, f"job {job}: {', '.join(sorted(states))}", states == {"COMPLETED"})


CHECKS: dict[str, Callable[[Check], None]] = {
    "devices": check_devices,
    "array": check_worker_array,
    "requeued": check_requeue,
    "page": check_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("provider", nargs="?", help="bars in Qlib's layout, with nyse500")
    parser.add_argument("--jobs", type=int, default=6, help="number of jobs in the sweep")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--only",
        default=DEFAULT_CHECKS,
        help=f"checks to run, separated by commas: {DEFAULT_CHECKS},page",
    )
    parser.add_argument("--keep", help="keep the files of the check in this folder")
    parser.add_argument("--json", help="write the table's rows to this file")
    args = parser.parse_args()
    market = SYNTHETIC_DATA
    if args.provider:
        market = [*QLIB_DATA, f"data.provider_uri={Path(args.provider).resolve()}"]
    with tempfile.TemporaryDirectory(
        prefix="qtorch-slurm-", ignore_cleanup_errors=True
    ) as temporary_folder:
        folder = Path(args.keep or temporary_folder).resolve()
        (folder / "slurm").mkdir(parents=True)
        with Cluster(folder / "slurm") as cluster:
            check = Check(cluster, folder, market, args.epochs)
            for name in args.only.split(","):
                print(f"{name}:", file=sys.stderr)
                start_time = time.monotonic()
                try:
                    check_sweep(check, args.jobs) if name == "sweep" else CHECKS[name](check)
                except Exception as error:
                    check.add_row(name, f"{type(error).__name__}: {error}", False)
                print(f"  {time.monotonic() - start_time:.0f} s", file=sys.stderr, flush=True)
        if not all(has_passed for _, _, has_passed in check.rows):
            print((folder / "commands.log").read_text()[-8000:], file=sys.stderr)
    print(
        f"\n| on SLURM {'(real bars)' if args.provider else ''} | details | passed |\n|---|---|---|"
    )
    for name, details, has_passed in check.rows:
        print(f"| {name} | {details} | {'yes' if has_passed else 'NO'} |")
    if args.json:
        Path(args.json).write_text(json.dumps(check.rows))
    return int(not all(has_passed for _, _, has_passed in check.rows))


if __name__ == "__main__":
    sys.exit(main())
