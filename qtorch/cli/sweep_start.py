"""Start a sweep: its MLflow run, its fork server and its signal handlers."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from qtorch.cli.guard import INTERRUPTED
from qtorch.cli.isolation import WORK_MODULE, is_isolated, share_fork_server
from qtorch.cli.submitted import is_submitit, set_submitit_signal
from qtorch.cli.sweep import FAILED, RUNNING, SweepStartError, collect_results
from qtorch.core.errors import ConfigError
from qtorch.core.stops import STOP_SIGNALS
from qtorch.task.forked import TRAINING_MODULES, ForkServerClient

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
        self.fork_server: ForkServerClient | None = None
        self.waits_in_main_thread = False  # whether the main thread itself waits for the jobs
        self._handlers: dict[int, Any] = {}

    @property
    def is_stopped(self) -> bool:
        """Whether Ctrl-C or a signal has stopped the sweep."""
        return self.fork_server is not None and self.fork_server.is_stopped

    def start_processes(self, folder: Path) -> None:
        """Start the fork server of the jobs, and forward stop signals to it."""
        self.fork_server = ForkServerClient(*TRAINING_MODULES, WORK_MODULE)
        share_fork_server(self.fork_server, folder)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._on_signal) for n in STOP_SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop the jobs in an orderly way at the first signal; exit immediately at a second Ctrl-C.

        Further signals of a scheduler are ignored: it may send several, to every process.
        """
        assert self.fork_server is not None
        if self.fork_server.is_stopped:
            if number == signal.SIGINT:
                print("interrupted twice: exiting immediately.", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)  # the fork server notices and ends the running jobs
            return
        signal_name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"{signal_name}: the jobs write a checkpoint and stop.", file=sys.stderr, flush=True)
        self.fork_server.stop(signal.SIGTERM if number == signal.SIGINT else number)
        if self.waits_in_main_thread and not self.fork_server.is_busy:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Restore the signal handlers and end the processes."""
        for number, handler in self._handlers.items():
            # Another handler means that the handlers have been restored already.
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        if self.fork_server is not None:
            self.fork_server.close()
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
        if config.runner == LOCAL and is_isolated(config.sweep.isolate, launcher, sweep=True):
            sweep.start_processes(Path(str(config.hydra.sweep.dir)).resolve())
        if is_submitit(launcher):
            set_submitit_signal()
        sweep.waits_in_main_thread = launcher.endswith("BasicLauncher")
        sweep.recorder = _start_run(config, sweep.name, overrides)
    except Exception as error:
        raise SweepStartError from error
    id = sweep.recorder.id
    config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{SWEEP_VARIABLE}={id}")
    print(f"started sweep {sweep.name} (run {id})", file=sys.stderr)


def _check_launcher(launcher: str) -> None:
    if launcher not in Plugins.instance().class_name_to_class:
        raise ConfigError(
            f"the launcher {launcher} is not installed: pip install 'qtorch[sweep]' installs "
            "joblib and submitit."
        )


def _start_run(config: DictConfig, name: str, overrides: list[str]) -> Any:
    from qtorch.cli.work import silence_libraries
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
