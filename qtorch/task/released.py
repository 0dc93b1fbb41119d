"""Run one task in its own process, which frees all memory, also of a GPU, when it exits."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qtorch.core.errors import TaskError, TrustError
from qtorch.core.heartbeat import RUN
from qtorch.core.session import TRUSTED_VARIABLE, get_trusted_packages, session
from qtorch.task.definition import Task
from qtorch.task.forked import ForkError
from qtorch.task.lease import LeaseRenewer
from qtorch.task.process import FENCE_FRACTION, SIGNAL_SECONDS, ChildLauncher, ChildProcess
from qtorch.task.query import PART_DONE

POLL_SECONDS = 0.2
SEND_SECONDS = 60.0  # for the child to start and accept its task
GRACE_SECONDS = 30.0  # for an interrupted training to write a checkpoint


class SubprocessError(TaskError):
    """The task's process failed; `traceback_text` is its traceback, if it sent one."""

    def __init__(self, message: str, traceback_text: str | None = None) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


class SubprocessStartError(ForkError):
    """The task's process could not be started, or was lost before the task began."""


def call_in_subprocess(
    launcher: ChildLauncher,
    name: str,
    task: Task,
    before: str,
    options: Mapping[str, Any],
    lease: LeaseRenewer,
) -> Any:
    """Call a function, named by its import path, in a child; return the result as stored.

    The child inherits the environment, the import path, the trusted packages and the tracking
    store. If this process is interrupted, the child gets time to write a checkpoint. A child that
    hangs, or whose lease is lost (another worker may have claimed the task), is killed without
    delay. Raises ForkError if no child can be started, which is not the task's fault.
    """
    request = {"func": name, "definition": task["def"], "options": dict(options), "last": True}
    request["res"] = task["res"] if before == PART_DONE else None
    try:
        return _run_in_child(launcher, request, lease)
    except SubprocessStartError:
        time.sleep(SIGNAL_SECONDS)  # this process may be about to get the same stop signal
        return _run_in_child(launcher, request, lease)


def _run_in_child(launcher: ChildLauncher, request: Mapping[str, Any], lease: LeaseRenewer) -> Any:
    try:
        child = launcher.start(_child_environment(), FENCE_FRACTION * lease.manager.lease)
    except ForkError as error:
        raise SubprocessStartError(str(error)) from error

    def is_cancelled() -> bool:
        return lease.lease_lost.is_set() or lease.work_hung.is_set()

    try:
        child.send(request, SEND_SECONDS, is_cancelled)
        return _wait_for_result(child, lease, None)
    except KeyboardInterrupt:
        if lease.work_hung.is_set() and not child.is_started:
            child.stop_server()
        if lease.lease_lost.is_set() or lease.work_hung.is_set():
            raise
        child.send({"stop": True})
        with suppress(SubprocessError, ForkError):  # how the stopped child ended does not matter
            _wait_for_result(child, lease, time.monotonic() + GRACE_SECONDS)
        raise
    finally:
        child.kill()


def _wait_for_result(child: ChildProcess, lease: LeaseRenewer, deadline: float | None) -> Any:
    is_ready = False
    while deadline is None or time.monotonic() < deadline:
        child.ping()
        if lease.lease_lost.is_set() or lease.work_hung.is_set():
            raise KeyboardInterrupt  # needed if run_task is in a thread, which gets no signal
        messages = child.receive(POLL_SECONDS)
        if messages is None and child.is_server_failure:
            error_class = ForkError if is_ready else SubprocessStartError
            raise error_class(f"the task's process {child.describe_exit()}.")
        if messages is None:
            raise SubprocessError(f"the task's process {child.describe_exit()} without a result.")
        for message in messages:
            is_ready = is_ready or "ready" in message
            if "run" in message:
                lease.beat(RUN, message["run"])
            elif "beat" in message:
                lease.report_progress(message["beat"])
            elif "result" in message:
                return message["result"]
            elif "refused" in message:
                raise TrustError(message["refused"])
            elif "error" in message:
                raise SubprocessError(message["error"], message.get("traceback"))
            elif "unusable" in message:
                raise SubprocessError(message["unusable"])
            elif "interrupted" in message and deadline is None:
                time.sleep(SIGNAL_SECONDS)  # this process may be about to get the same stop signal
                raise ForkError("the fork server was stopped.")
            elif "interrupted" in message:
                raise KeyboardInterrupt
    return None


def _child_environment() -> dict[str, str]:
    variables = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if get_trusted_packages():
        variables[TRUSTED_VARIABLE] = ",".join(get_trusted_packages())
    if session().tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = str(session().tracking_uri)
    return variables
