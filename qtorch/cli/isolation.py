"""Run each job of a sweep in its own process if the launcher would run several in one."""

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

from qtorch.cli.submitted import is_submitit
from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.heartbeat import RUN
from qtorch.task.forked import (
    TRAINING_MODULES,
    ExitStatus,
    ForkError,
    ForkServerClient,
    call_fork_server,
)

log = logging.getLogger(__name__)

WORK_MODULE = "qtorch.cli.work"
ADDRESS_FILE = ".zygote.json"
MODES = ("auto", "true", "false")

_fork_servers: list[ForkServerClient] = []


def is_isolated(mode: Any, launcher: str, *, sweep: bool) -> bool:
    """Whether a job runs in its own process; `mode` is auto, true or false."""
    mode_name = str(mode).lower()
    if mode_name not in MODES:
        raise ConfigError(f"sweep.isolate={mode}: expected auto, true or false.")
    # A Ray worker runs only one job; a child of it could survive if the worker is killed.
    has_own_process = is_submitit(launcher) or launcher.endswith("RayLauncher")
    return mode_name == "true" or (mode_name == "auto" and sweep and not has_own_process)


def share_fork_server(server: ForkServerClient, folder: Path) -> None:
    """Publish the fork server's address for the launcher's other processes on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    address = {"host": socket.gethostname(), "address": server.address}
    (folder / ADDRESS_FILE).write_text(json.dumps(address))
    _fork_servers.append(server)


def run_in_child_process(
    request: Mapping[str, Any], folder: Path
) -> tuple[ExitStatus, dict[str, Any] | None]:
    """Run a job in a child process; return its exit status and the run that it started."""
    runs: list[dict[str, Any]] = []
    function = f"{__name__}.run_child_job"
    exit_status = _choose_fork_server(folder)(
        function, request, lambda details: runs.append(details[RUN])
    )
    return exit_status, runs[-1] if runs else None


def _choose_fork_server(folder: Path) -> Callable[..., ExitStatus]:
    """Choose the fork server of this process, of the sweep, or a new one; return its `call`."""
    _fork_servers[:] = [f for f in _fork_servers if f.is_open]
    if _fork_servers:
        return _fork_servers[-1].call
    address = _read_address(folder)
    if address is not None:

        def call(*arguments: Any) -> ExitStatus:
            # In a launcher's worker: the process that started the sweep handles Ctrl-C.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                return call_fork_server(address, *arguments)
            except ForkError:
                log.debug("the process of the sweep has ended", exc_info=True)
                return ExitStatus(None, is_refused=True)

        return call
    server = ForkServerClient(*TRAINING_MODULES, WORK_MODULE)
    atexit.register(server.close)
    _fork_servers.append(server)
    return server.call


def _read_address(folder: Path) -> str | None:
    try:
        record = json.loads((folder / ADDRESS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return str(record["address"]) if record["host"] == socket.gethostname() else None


def run_child_job(request: Mapping[str, Any], report: Callable[[dict[str, Any]], None]) -> int:
    """Execute the job in the child and report its run as soon as it is created."""
    from qtorch.cli.work import execute_job
    from qtorch.trainer.isolated import report_started_runs

    try:
        with report_started_runs(report):
            execute_job(request)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def fail_lost_run(run: Mapping[str, Any], message: str) -> None:
    """Mark the run of a dead process FAILED, because the process cannot do so itself."""
    from qtorch.tracking.r import R
    from qtorch.trainer.isolated import fail_run

    try:
        with R.uri_context(run["tracking_uri"]):
            fail_run(R.get_recorder(recorder_id=run["recorder_id"]), message)
    except QtorchError as error:
        print(f"cannot mark run {run['recorder_id']} as failed: {error}", file=sys.stderr)


def failure_hint(exit_status: ExitStatus) -> str:
    """Return a likely reason for this exit status of a job's process."""
    is_killed = exit_status.code == -signal.SIGKILL
    return " (out of memory? the kernel kills the largest process)" if is_killed else ""
