"""The beginning and the end of a sweep's command: its run, its processes, its signals."""

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
from qtorch.cli.isolation import WORK_MODULE, isolated, share
from qtorch.cli.submitted import choose_signal, submitted
from qtorch.cli.sweep import FAILED, RUNNING, Refusal, collect_from
from qtorch.core.errors import ConfigError
from qtorch.core.stops import STOPS
from qtorch.task.forked import TRAINING, Forks

SWEEP_VARIABLE = "QTORCH_SWEEP"  # the id of the sweep's run, for its jobs
NAME = re.compile(r"[\w.\-]+")
# How a sweep is run and shown, not what it is.
MANNER = re.compile(
    r"[+~]*(hydra[./]|hydra$|sweep\.|tracking[.=@]|log_level=|runner=|pool=|url=|wait=)"
)
LOCAL = "local"


class SweepCommand:
    """What the process that started a sweep holds until its end."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.launcher = ""
        self.recorder: Any = None
        self.forks: Forks | None = None
        self.in_this_thread = False  # whether the jobs are waited for by the main thread itself
        self._handlers: dict[int, Any] = {}

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C or a signal has stopped it."""
        return self.forks is not None and self.forks.stopped

    def start_processes(self, folder: Path) -> None:
        """The zygote of the jobs, and the signals that it passes on."""
        self.forks = Forks(*TRAINING, WORK_MODULE)
        share(self.forks, folder)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._on_signal) for n in STOPS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first stops the jobs in order, a second Ctrl-C ends all at once.

        A scheduler's signals count once: several may come, to every process.
        """
        assert self.forks is not None
        if self.forks.stopped:
            if number == signal.SIGINT:
                print("interrupted twice: ending at once.", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)  # the zygote notices, and ends what runs
            return
        told = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"{told}: the jobs keep a checkpoint and stop.", file=sys.stderr, flush=True)
        self.forks.stop(signal.SIGTERM if number == signal.SIGINT else number)
        if self.in_this_thread and not self.forks.busy:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Give the signals back, end the processes."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:  # else they are given back already
                signal.signal(number, handler)
        if self.forks is not None:
            self.forks.close()
        if self.recorder is not None and self.recorder.status == RUNNING:
            self.recorder.end_run(FAILED)  # the command did not come to its table


class SweepFolder(Callback):
    """Begins a sweep, and tells the starting process where its jobs put their results.

    Hydra gives a sweep's return values to nobody, and a launcher's workers share no memory.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the sweep's folder; make its run and its processes."""
        collect_from(Path(str(config.hydra.sweep.dir)).resolve())
        begin(config)


_command: list[SweepCommand] = []


def the_sweep() -> SweepCommand | None:
    """The sweep that this process has started; None where it is a job, or no sweep runs."""
    return _command[-1] if _command else None


def forget_sweep() -> None:
    """The command is at its end."""
    while _command:
        _command.pop().close()


def begin(config: DictConfig) -> None:
    """Called by Hydra before the first job: processes, the sweep's run, its id for the jobs."""
    sweep = SweepCommand()
    _command.append(sweep)
    try:
        overrides = list(config.hydra.overrides.task)
        sweep.name = sweep_name(config.sweep.name, overrides)
        launcher = sweep.launcher = str(config.hydra.launcher._target_)
        _check_installed(launcher)
        if config.runner == LOCAL and isolated(config.sweep.isolate, launcher, sweep=True):
            sweep.start_processes(Path(str(config.hydra.sweep.dir)).resolve())
        if submitted(launcher):
            choose_signal()
        sweep.in_this_thread = launcher.endswith("BasicLauncher")
        sweep.recorder = _run_of(config, sweep.name, overrides)
    except Exception as error:
        raise Refusal from error
    id = sweep.recorder.id
    config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{SWEEP_VARIABLE}={id}")
    print(f"sweep {sweep.name}, run {id}", file=sys.stderr)


def _check_installed(launcher: str) -> None:
    if launcher not in Plugins.instance().class_name_to_class:
        raise ConfigError(
            f"the launcher {launcher} is not installed here: pip install 'qtorch[sweep]' brings "
            "joblib and submitit."
        )


def _run_of(config: DictConfig, name: str, overrides: list[str]) -> Any:
    from qtorch.cli.work import quiet_libraries
    from qtorch.core.runtime import configure_logging
    from qtorch.core.session import init
    from qtorch.study.sweep import begin_sweep

    configure_logging(config.log_level)
    quiet_libraries()
    uri = OmegaConf.select(config, "tracking.uri")
    if uri is not None:
        init(tracking_uri=str(uri))
    return begin_sweep(
        name,
        config.experiment_name,
        typed(),
        told=plain_words(typed()),
        count=count_of(config, overrides),
        folder=os.getcwd(),
    )


def typed() -> list[str]:
    """The words of the command that `resume` repeats."""
    words = [a for a in sys.argv[1:] if a not in ("-m", "--multirun")]
    return [w for w in dict.fromkeys(words) if not w.startswith("sweep.retry=")]


def plain_words(overrides: Sequence[str]) -> list[str]:
    """The overrides that say what is run, without those that say in what manner."""
    return [o for o in overrides if not MANNER.match(o)]


def sweep_name(given: str | None, overrides: Sequence[str]) -> str:
    """The name given, else what is varied and a digest of the overrides that say what is run."""
    if given is not None:
        if not NAME.fullmatch(str(given)):
            raise ConfigError(f"sweep.name={given!r}: letters, digits, - _ and . make a name.")
        return str(given)
    own = sorted(plain_words(overrides))
    parsed = OverridesParser.create().parse_overrides(own)
    keys = [str(p.key_or_group).rpartition(".")[2] for p in parsed if p.is_sweep_override()]
    varied = "-".join(k for k in dict.fromkeys(keys) if NAME.fullmatch(k))
    return f"{varied[:40] or 'sweep'}-{sha256(chr(10).join(own).encode()).hexdigest()[:6]}"


def count_of(config: DictConfig, overrides: Sequence[str]) -> int | None:
    """How many jobs there will be, as far as can be told beforehand."""
    trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
    if trials is not None:
        return int(trials)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        varied = [p for p in parsed if p.is_sweep_override()]
        if not all(p.is_discrete_sweep() for p in varied):
            return None
        return math.prod(len(list(p.sweep_string_iterator())) for p in varied)
    except HydraException:
        return None
