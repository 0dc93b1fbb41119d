"""Each job of a sweep in a process of its own, where the launcher would use one for several."""

from __future__ import annotations

import atexit
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtorch.cli.submitted import submitted
from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.heartbeat import RUN
from qtorch.task.forked import TRAINING, Ended, ForkError, Forks, call_at

log = logging.getLogger(__name__)

WORK_MODULE = "qtorch.cli.work"
ADDRESS_FILE = ".zygote.json"
MODES = ("auto", "true", "false")

_forks: list[Forks] = []


def isolated(mode: Any, launcher: str, *, sweep: bool) -> bool:
    """Whether a job gets a process of its own; `mode` is auto, true or false."""
    told = str(mode).lower()
    if told not in MODES:
        raise ConfigError(f"sweep.isolate={mode}: expected auto, true or false.")
    # A Ray worker ends with its job: one that is killed must not leave the work behind.
    own = submitted(launcher) or launcher.endswith("RayLauncher")
    return told == "true" or (told == "auto" and sweep and not own)


def share(forks: Forks, folder: Path) -> None:
    """Tell the launcher's other processes on this machine where the zygote is."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"host": socket.gethostname(), "address": forks.address}
    (folder / ADDRESS_FILE).write_text(json.dumps(told))
    _forks.append(forks)


def in_own_process(request: Mapping[str, Any], folder: Path) -> tuple[Ended, dict[str, Any] | None]:
    """Have a child do a job; how it ended, and the run that it had started."""
    runs: list[dict[str, Any]] = []
    function = f"{__name__}.work_here"
    ended = _call(folder)(function, request, lambda told: runs.append(told[RUN]))
    return ended, runs[-1] if runs else None


def _call(folder: Path) -> Callable[..., Ended]:
    """By this process's zygote, by the sweep's, or by one that is started now."""
    _forks[:] = [f for f in _forks if f.open]
    if _forks:
        return _forks[-1].call
    address = _shared_address(folder)
    if address is not None:

        def call(*arguments: Any) -> Ended:
            # A worker of a launcher: the terminal's Ctrl-C is for the process that started it.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                return call_at(address, *arguments)
            except ForkError:
                log.debug("the sweep's own process is gone", exc_info=True)
                return Ended(None, refused=True)

        return call
    forks = Forks(*TRAINING, WORK_MODULE)
    atexit.register(forks.close)
    _forks.append(forks)
    return forks.call


def _shared_address(folder: Path) -> str | None:
    try:
        told = json.loads((folder / ADDRESS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return str(told["address"]) if told["host"] == socket.gethostname() else None


def work_here(request: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """The child's side: the job, telling of its run as soon as there is one."""
    from qtorch.cli.work import work
    from qtorch.trainer.isolated import telling_of_runs

    try:
        with telling_of_runs(tell):
            work(request)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def close_lost(run: Mapping[str, Any], message: str) -> None:
    """Mark the run of a process that is gone FAILED: nobody else can."""
    from qtorch.tracking.r import R
    from qtorch.trainer.isolated import close_run

    try:
        with R.uri_context(run["tracking_uri"]):
            close_run(R.get_recorder(recorder_id=run["recorder_id"]), message)
    except QtorchError as error:
        print(f"run {run['recorder_id']} could not be closed: {error}", file=sys.stderr)


def hint(ended: Ended) -> str:
    """What a job's process that ended like this may have met."""
    killed = ended.code == -signal.SIGKILL
    return " (out of memory? the kernel ends the largest process)" if killed else ""
