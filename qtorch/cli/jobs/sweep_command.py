"""Start a sweep: its MLflow run, its fork server and its signal handlers."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.guard import INTERRUPTED
from qtorch.cli.jobs.results import (
    FAILED,
    KILLED,
    RUNNING,
    SENT,
    JobResult,
    SweepStartError,
    collect_results,
)
from qtorch.cli.jobs.work import LOCK_VARIABLE, is_isolated, job_fork_server
from qtorch.cli.launchers.slurm import is_submitit, set_submitit_signal
from qtorch.cli.tables import print_sweep
from qtorch.core.errors import ConfigError, TrackingError
from qtorch.process.stops import CommandLock, StopSignals
from qtorch.study.sweep import COMMAND_TAG, COUNT_TAG, SweepJob, adopt_run, end_sweep, sweep_jobs

SWEEP_VARIABLE = "QTORCH_SWEEP"  # the ID of the sweep's run, for its jobs
NAME_PATTERN = re.compile(r"[\w.\-]+")
# Overrides that control how a sweep is executed and displayed; they do not define its tasks.
EXECUTION_OVERRIDES = re.compile(
    r"[+~]*(hydra[./]|hydra$|sweep\.|tracking[.=@]|log_level=|runner=|pool=|url=|wait=)"
)
LOCAL = "local"


class SweepCommand:
    """The state of the process that started a sweep."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.launcher = ""
        self.recorder: Any = None
        self.waits_in_main_thread = False  # whether the main thread itself waits for the jobs
        self.lock: CommandLock | None = None  # for jobs that run in child processes
        self._signals = StopSignals(self._stop, self._exit)

    @property
    def is_stopped(self) -> bool:
        """Whether Ctrl-C or a signal has stopped the sweep."""
        return self.lock is not None and self.lock.is_released

    def start_processes(self) -> None:
        """Start the fork server, for jobs in this process, and handle stop signals."""
        self.lock = CommandLock()
        if self.waits_in_main_thread:
            job_fork_server().ensure_running()
        self._signals.install()

    def _stop(self, number: int) -> None:
        """Stop the jobs in an orderly way."""
        assert self.lock is not None
        signal_name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"{signal_name}: the jobs write a checkpoint and stop.", file=sys.stderr, flush=True)
        self.lock.release()
        if self.waits_in_main_thread and not job_fork_server().is_busy:
            raise KeyboardInterrupt

    def _exit(self) -> None:
        print("interrupted twice: exiting immediately.", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # the jobs notice it and end

    def close(self) -> None:
        """Restore the signal handlers and end the processes."""
        # Another handler means that the handlers have been restored already.
        if signal.getsignal(signal.SIGINT) == self._signals.handle:
            self._signals.restore()
        if self.lock is not None:
            self.lock.close()
        if self.recorder is not None and self.recorder.status == RUNNING:
            self.recorder.end_run(FAILED)  # the command ended before its results table


class SweepCallback(Callback):
    """Starts the sweep's run, and makes the command collect results from the sweep's folder.

    Hydra discards the return values of a sweep's jobs, and a launcher's workers share no memory
    with the command.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Register the sweep's folder; start its run and its processes."""
        collect_results(Path(str(config.hydra.sweep.dir)).resolve())
        begin_sweep(config)


_sweeps: list[SweepCommand] = []


def current_sweep() -> SweepCommand | None:
    """Return the sweep that this process has started; None in a job, or without a sweep."""
    return _sweeps[-1] if _sweeps else None


def close_sweep() -> None:
    """Close the sweep at the end of the command."""
    while _sweeps:
        _sweeps.pop().close()


def begin_sweep(config: DictConfig) -> None:
    """Start the processes and the sweep's run, and pass the run's ID to the jobs.

    Hydra calls this before the first job, through SweepCallback.
    """
    sweep = SweepCommand()
    _sweeps.append(sweep)
    try:
        overrides = list(config.hydra.overrides.task)
        sweep.name = sweep_name(config.sweep.name, overrides)
        launcher = sweep.launcher = str(config.hydra.launcher._target_)
        _check_launcher(launcher)
        sweep.waits_in_main_thread = launcher.endswith("BasicLauncher")
        if config.runner == LOCAL and is_isolated(config.sweep.isolate, launcher, sweep=True):
            sweep.start_processes()
        if is_submitit(launcher):
            set_submitit_signal()
        sweep.recorder = _start_run(config, sweep.name, overrides)
    except Exception as error:
        raise SweepStartError from error
    id = sweep.recorder.id
    job_variables = {SWEEP_VARIABLE: id}
    if sweep.lock is not None:
        job_variables[LOCK_VARIABLE] = f"'{sweep.lock.path}'"
    for name, value in job_variables.items():
        config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{name}={value}")
    print(f"started sweep {sweep.name} (run {id})", file=sys.stderr)


def _check_launcher(launcher: str) -> None:
    if launcher not in Plugins.instance().class_name_to_class:
        raise ConfigError(
            f"the launcher {launcher} is not installed: pip install 'qtorch[sweep]' installs "
            "joblib and submitit."
        )


def _start_run(config: DictConfig, name: str, overrides: list[str]) -> Any:
    from qtorch.cli.jobs.work import silence_libraries
    from qtorch.core.runtime import configure_logging
    from qtorch.core.session import init
    from qtorch.study.sweep import start_sweep

    configure_logging(config.log_level)
    silence_libraries()
    uri = OmegaConf.select(config, "tracking.uri")
    if uri is not None:
        init(tracking_uri=str(uri))
    return start_sweep(
        name,
        config.experiment_name,
        command_words(),
        overrides=task_overrides(command_words()),
        count=count_jobs(config, overrides),
        folder=os.getcwd(),
    )


def command_words() -> list[str]:
    """Return the words of the command that `qtorch sweep resume` repeats."""
    words = [a for a in sys.argv[1:] if a not in ("-m", "--multirun")]
    return [w for w in dict.fromkeys(words) if not w.startswith("sweep.retry=")]


def task_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that define the tasks, without those that control their execution."""
    return [o for o in overrides if not EXECUTION_OVERRIDES.match(o)]


def sweep_name(name: str | None, overrides: Sequence[str]) -> str:
    """Return the given name, or the varied keys followed by a digest of the task overrides."""
    if name is not None:
        if not NAME_PATTERN.fullmatch(str(name)):
            raise ConfigError(f"sweep.name={name!r}: use only letters, digits and - _ . in a name.")
        return str(name)
    identity = sorted(task_overrides(overrides))
    parsed_overrides = OverridesParser.create().parse_overrides(identity)
    keys = [
        str(p.key_or_group).rpartition(".")[2] for p in parsed_overrides if p.is_sweep_override()
    ]
    varied_keys = "-".join(k for k in dict.fromkeys(keys) if NAME_PATTERN.fullmatch(k))
    return (
        f"{varied_keys[:40] or 'sweep'}-{sha256(chr(10).join(identity).encode()).hexdigest()[:6]}"
    )


def count_jobs(config: DictConfig, overrides: Sequence[str]) -> int | None:
    """Count the jobs of the sweep; None if their number is not known beforehand."""
    num_trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
    if num_trials is not None:
        return int(num_trials)
    try:
        parsed_overrides = OverridesParser.create().parse_overrides(list(overrides))
        sweep_overrides = [p for p in parsed_overrides if p.is_sweep_override()]
        if not all(p.is_discrete_sweep() for p in sweep_overrides):
            return None
        return math.prod(len(list(p.sweep_string_iterator())) for p in sweep_overrides)
    except HydraException:
        return None


def finish_sweep(results: Sequence[JobResult], interruption: BaseException | None) -> int:
    """Print the results, close the sweep's run and return the exit code.

    The code is 0 if all jobs finished, 1 if some failed, 130 if interrupted. `interruption` may
    also be an error of the launcher, which is raised again after the table.
    """
    sweep = current_sweep()
    if sweep is None or sweep.recorder is None:
        if interruption is not None:
            raise interruption
        return 1
    error = interruption if isinstance(interruption, Exception) else None
    is_interrupted = (interruption is not None and error is None) or sweep.is_stopped
    is_interrupted = is_interrupted or any(r.status == KILLED for r in results)
    jobs = list(results)
    try:
        for result in (r for r in results if r.pool_task and r.run_id):
            adopt_run(str(result.run_id), str(sweep.recorder.id), result.number, result.overrides)
        rows = _merge_results(results, sweep_jobs(str(sweep.recorder.id)))
        tags = sweep.recorder.list_tags()
        num_expected = int(tags[COUNT_TAG]) if COUNT_TAG in tags else None
        if rows or error is None:
            print_sweep(str(sweep.name), rows, num_expected, tags.get(COMMAND_TAG, ""))
        is_queued = any(r.status == SENT for r in results)
        if error is None or any(row.status == RUNNING for row in rows):
            end_sweep(sweep.recorder, is_interrupted=is_interrupted, is_queued=is_queued)
    except TrackingError as tracking_error:
        print(f"error: {tracking_error}", file=sys.stderr)
    for job in jobs:
        if job.error and job.status != KILLED:
            print(f"error: job {job.number}: {job.error}", file=sys.stderr)
    if error is not None:
        raise error
    if is_interrupted:
        _print_resume_hint(sweep)
        return INTERRUPTED
    return int(any(j.error for j in jobs))


def _merge_results(results: Sequence[JobResult], jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """Merge the jobs in the tracking store with what only this process knows."""
    results_by_run = {r.run_id: r for r in results if r.run_id}
    rows = []
    for job in jobs:
        result = results_by_run.get(str(job.run_id))
        note = job.note if result is None else result.note
        rows.append(SweepJob(**{**vars(job), "note": note}))
    run_ids = {j.run_id for j in rows}
    rows += [
        _result_row(r)
        for r in results
        if r.run_id not in run_ids and (r.run_id or r.status != KILLED)
    ]
    return sorted(rows, key=lambda j: j.number)


def _result_row(result: JobResult) -> SweepJob:
    """Convert a result without a run in the sweep's store to a row of the table."""
    return SweepJob(
        number=result.number,
        overrides=result.overrides,
        status=result.status,
        run_id=result.run_id,
        metrics=result.metrics,
        seconds=result.seconds,
        setting=f"job {result.number}",
        error=result.error,
        note=f"task {result.pool_task['id']}" if result.pool_task else result.note,
    )


def _print_resume_hint(sweep: SweepCommand) -> None:
    if is_submitit(sweep.launcher):
        text = f"submitted jobs continue; follow them with qtorch sweep show {sweep.name}"
    else:
        text = "finished jobs are kept, started jobs resume from their checkpoints"
    print(
        f"interrupted: {text}. Resume with: qtorch sweep resume {sweep.name}",
        file=sys.stderr,
    )
