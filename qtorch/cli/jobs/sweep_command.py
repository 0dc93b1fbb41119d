"""The command that started a sweep: its MLflow run, its fork server, its signals, its results."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.compose import LOCAL, check_added_keys, check_values
from qtorch.cli.guard import INTERRUPTED, configure_process, error_line
from qtorch.cli.jobs.repeats import connect_repeats, failure_texts, store_repeats
from qtorch.cli.jobs.results import FAILED, KILLED, RUNNING, SENT, command_results
from qtorch.cli.jobs.stored_command import RESUME_WORDS
from qtorch.cli.jobs.work import is_isolated, job_fork_server
from qtorch.cli.launchers.kinds import DetachedLauncher, is_basic_launcher, launcher_class
from qtorch.cli.launchers.slurm import set_submitit_signal
from qtorch.cli.overrides import redact_config
from qtorch.cli.tables.jobs import print_sweep
from qtorch.core.errors import ConfigError, TrackingError, install_command, printable_text
from qtorch.core.files import write_private
from qtorch.core.session import LOCK_VARIABLE, SWEEP_VARIABLE
from qtorch.process.stops import CommandLock, StopSignals, stop_name
from qtorch.study.sweep import (
    COMMAND_TAG,
    COUNT_TAG,
    JobResult,
    adopt_run,
    end_sweep,
    start_sweep,
    sweep_jobs,
)
from qtorch.tracking.claims import share_run

# The workflow files of `qtorch run` in this process, as plain YAML by their digest.
WORKFLOWS: dict[str, str] = {}
MULTIRUN_WORDS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
NAME_PATTERN = re.compile(r"[\w.\-]+")
# Overrides that control how a sweep is executed and displayed; they do not define its tasks.
EXECUTION_OVERRIDES = re.compile(
    r"[+~]*(hydra[./]|hydra$|sweep\.|tracking[.=@]|log_level=|runner=|pool=|url=|wait=|workflow\.file=)"
)


class SweepStartError(BaseException):
    """A sweep cannot start.

    A BaseException, because Hydra turns the exceptions of callbacks into warnings.
    """


class SweepCallback(Callback):
    """Starts the sweep before Hydra's first job; conf/train.yaml names this class."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect results from the sweep's folder; start its run and its processes."""
        redact_config(config)
        command_results.watch_folder(Path(str(config.hydra.sweep.dir)))
        sweep = SweepCommand()
        _sweeps.append(sweep)
        try:
            sweep.start(config)
            # Hydra writes into this file.
            write_private(Path(str(config.hydra.sweep.dir), "multirun.yaml"), "")
        except Exception as error:
            raise SweepStartError from error


class SweepCommand:
    """The state of the process that started a sweep."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.launcher: type[Any] = BasicLauncher
        self.recorder: Any = None
        self.lock: CommandLock | None = None  # for jobs that run in child processes
        self._signals = StopSignals(self._stop, self._exit)
        self._claim = ExitStack()  # of the sweep's run, until the command ends

    @property
    def is_stopped(self) -> bool:
        """Whether Ctrl-C or a signal has stopped the sweep."""
        return self.lock is not None and self.lock.is_released

    def start(self, config: DictConfig) -> None:
        """Start the processes and the sweep's run, and pass the run's ID to the jobs."""
        overrides = list(config.hydra.overrides.task)
        check_values(config)
        check_added_keys(
            OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]),
            overrides,
            OmegaConf.to_container(config.hydra, resolve=False),
        )
        self.name = sweep_name(config.sweep.name, overrides)
        launcher = str(config.hydra.launcher._target_)
        if launcher not in Plugins.instance().class_name_to_class:
            raise ConfigError(
                f"the launcher {launcher} is not installed: {install_command('sweep')} installs "
                "joblib and submitit."
            )
        self.launcher = launcher_class(launcher)
        if config.runner == LOCAL and is_isolated(config.sweep.isolate, launcher, sweep=True):
            self.start_processes()
        if issubclass(self.launcher, DetachedLauncher):
            set_submitit_signal()
        configure_process(config.log_level, OmegaConf.select(config, "tracking.uri"))
        words = command_words()
        self.recorder = start_sweep(
            self.name,
            config.experiment_name,
            words,
            overrides=task_overrides(words),
            count=count_jobs(config, overrides),
            folder=os.getcwd(),
            data=OmegaConf.to_container(config.data, resolve=False) if "data" in config else None,
            **({"workflows": dict(WORKFLOWS)} if "workflow" in config else {}),
        )
        id = self.recorder.id
        self._claim.enter_context(share_run(str(id), self.recorder.uri))
        job_variables = {SWEEP_VARIABLE: id}
        if self.lock is not None:
            job_variables[LOCK_VARIABLE] = f"'{self.lock.path}'"
        for name, value in job_variables.items():
            config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{name}={value}")
        print(f"started sweep {self.name} (run {id})", file=sys.stderr)

    def start_processes(self) -> None:
        """Start the fork server, for jobs in this process, and handle stop signals."""
        self.lock = CommandLock()
        if self._waits_in_main_thread:
            job_fork_server().ensure_running()
        self._signals.install()

    @property
    def _waits_in_main_thread(self) -> bool:
        """Whether the main thread itself waits for the jobs.

        Other launchers wait for theirs in other threads or processes.
        """
        return is_basic_launcher(self.launcher)

    def _stop(self, number: int) -> None:
        """Stop the jobs in an orderly way."""
        assert self.lock is not None
        text = f"{stop_name(number)}: the jobs write a checkpoint and stop."
        print(text, file=sys.stderr, flush=True)
        self.lock.release()
        if self._waits_in_main_thread and not job_fork_server().is_calling:
            raise KeyboardInterrupt

    def _exit(self) -> None:
        print("interrupted twice: exiting immediately.", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # the jobs notice it and end

    def finish(self, results: Sequence[JobResult], interruption: BaseException | None) -> int:
        """Print the results, end the sweep's run and return the exit code.

        The code is 0 if all jobs finished, 1 if some failed, 130 if interrupted. `interruption` may
        also be an error of the launcher, which is raised again after the table.
        """
        connect_repeats(results)
        error = interruption if isinstance(interruption, Exception) else None
        is_interrupted = (
            (interruption is not None and error is None)
            or self.is_stopped
            or any(r.status == KILLED for r in results)
        )
        try:
            self._end_run(results, has_error=error is not None, is_interrupted=is_interrupted)
        except TrackingError as tracking_error:
            print(f"error: {error_line(tracking_error)}", file=sys.stderr)
        for text in failure_texts(results):
            print(f"error: {printable_text(text)}", file=sys.stderr)
        if error is not None:
            raise error
        if is_interrupted:
            self._print_resume_hint()
            return INTERRUPTED
        return int(any(r.error for r in results))

    def _end_run(
        self, results: Sequence[JobResult], *, has_error: bool, is_interrupted: bool
    ) -> None:
        """Print the sweep's table and end its run.

        After an error of the launcher, `close` ends the run unless some jobs are still running.
        """
        id = str(self.recorder.id)
        for result in (r for r in results if r.pool_task and r.run_id):
            adopt_run(str(result.run_id), id, result.number, result.overrides)
        store_repeats(id, results)
        rows = _merge_results(results, sweep_jobs(id))
        tags = self.recorder.list_tags()
        num_expected = int(tags[COUNT_TAG]) if COUNT_TAG in tags else None
        if rows or not has_error:
            print_sweep(str(self.name), rows, num_expected, tags.get(COMMAND_TAG, ""))
        if not has_error or any(row.status == RUNNING for row in rows):
            is_queued = any(r.status == SENT for r in results)
            end_sweep(self.recorder, is_interrupted=is_interrupted, is_queued=is_queued)

    def _print_resume_hint(self) -> None:
        if issubclass(self.launcher, DetachedLauncher):
            text = f"submitted jobs continue; follow them with qtorch sweep show {self.name}"
        else:
            text = "finished jobs are kept, started jobs resume from their checkpoints"
        print(f"interrupted: {text}. Resume with: qtorch sweep resume {self.name}", file=sys.stderr)

    def close(self) -> None:
        """Restore the signal handlers and end the processes."""
        # Another handler means that the handlers have been restored already.
        if signal.getsignal(signal.SIGINT) == self._signals.handle:
            self._signals.restore()
        if self.lock is not None:
            self.lock.close()
        if self.recorder is not None and self.recorder.status == RUNNING:
            self.recorder.end_run(FAILED)  # the command ended before its results table
        self._claim.close()


_sweeps: list[SweepCommand] = []


def current_sweep() -> SweepCommand | None:
    """Return the sweep that this process has started; None in a job, or without a sweep."""
    return _sweeps[-1] if _sweeps else None


def close_sweep() -> None:
    """Close the sweep at the end of the command."""
    while _sweeps:
        _sweeps.pop().close()


def _merge_results(results: Sequence[JobResult], jobs: Sequence[JobResult]) -> list[JobResult]:
    """Merge the jobs in the tracking store with what only this process knows."""
    notes: dict[str | None, str | None] = {
        r.run_id: r.note for r in results if r.run_id and r.same_as is None
    }
    rows = [replace(j, note=notes.get(j.run_id, j.note)) for j in jobs]
    run_ids = {j.run_id for j in rows}
    rows += [
        replace(r, setting=f"job {r.number}")
        for r in results
        if r.run_id not in run_ids and (r.run_id or r.status != KILLED)
    ]
    return sorted(rows, key=lambda j: j.number)


# -- the command's words ---------------------------------------------------------------------------


def command_words() -> list[str]:
    """Return the words of the command that `qtorch sweep resume` repeats."""
    words = [a for a in sys.argv[1:] if a not in MULTIRUN_WORDS]
    return [w for w in dict.fromkeys(words) if not w.startswith(RESUME_WORDS)]


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
    digest = sha256("\n".join(identity).encode()).hexdigest()[:6]
    return f"{varied_keys[:40] or 'sweep'}-{digest}"


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
