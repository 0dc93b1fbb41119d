"""One task in a process of its own, whose memory (the GPU's too) comes back whole."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qtorch.core.errors import TaskError, TrustError
from qtorch.core.heartbeat import RUN
from qtorch.core.session import TRUSTED_VARIABLE, session, trusted_packages
from qtorch.task.definition import Task
from qtorch.task.forked import ForkError
from qtorch.task.lease import LeaseKeeper
from qtorch.task.process import FENCE, SIGNAL_SECONDS, ChildProcess, Children
from qtorch.task.query import PART_DONE

LOOK_SECONDS = 0.2
SAY_SECONDS = 60.0  # for the child to be there and take its task
GRACE_SECONDS = 30.0  # to a training that was asked to stop, for its checkpoint


class ReleasedError(TaskError):
    """The task's process failed; `traceback_text` is its traceback, if it could tell one."""

    def __init__(self, message: str, traceback_text: str | None = None) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


class UnbegunError(ForkError):
    """The task's process was not to be had, or lost before it had begun."""


def call_released(
    children: Children,
    name: str,
    task: Task,
    before: str,
    options: Mapping[str, Any],
    keeper: LeaseKeeper,
) -> Any:
    """What the function of that dotted name returns for the task, as the pool stores it.

    The child takes over the environment, the import path, the trusted packages and the tracking
    store. Interrupted, it is asked to stop and given time for a checkpoint; one that hangs, or
    whose task another worker may have by now, is ended at once. Raises ForkError where there is
    none to be had, which is no fault of the task.
    """
    request = {"func": name, "definition": task["def"], "options": dict(options), "last": True}
    request["res"] = task["res"] if before == PART_DONE else None
    try:
        return _called(children, request, keeper)
    except UnbegunError:
        time.sleep(SIGNAL_SECONDS)  # perhaps by a signal that has yet to come here
        return _called(children, request, keeper)


def _called(children: Children, request: Mapping[str, Any], keeper: LeaseKeeper) -> Any:
    try:
        child = children.start(_environment(), FENCE * keeper.manager.lease)
    except ForkError as error:
        raise UnbegunError(str(error)) from error

    def over() -> bool:
        return keeper.lost.is_set() or keeper.hung.is_set()

    try:
        child.say(request, SAY_SECONDS, over)
        return _answer(child, keeper, None)
    except KeyboardInterrupt:
        if keeper.hung.is_set() and not child.begun:
            child.disown()
        if keeper.lost.is_set() or keeper.hung.is_set():
            raise
        child.say({"stop": True})
        with suppress(ReleasedError, ForkError):  # it was asked to stop, and says how it did
            _answer(child, keeper, time.monotonic() + GRACE_SECONDS)
        raise
    finally:
        child.kill()


def _answer(child: ChildProcess, keeper: LeaseKeeper, until: float | None) -> Any:
    ready = False
    while until is None or time.monotonic() < until:
        child.ping()
        if keeper.lost.is_set() or keeper.hung.is_set():
            raise KeyboardInterrupt  # also where run_task is in a thread, which no signal reaches
        messages = child.messages(LOOK_SECONDS)
        if messages is None and child.without_cause:
            kind = ForkError if ready else UnbegunError
            raise kind(f"the task's process {child.how_it_ended()}.")
        if messages is None:
            raise ReleasedError(f"the task's process {child.how_it_ended()} without a result.")
        for message in messages:
            ready = ready or "ready" in message
            if "run" in message:
                keeper.beat(RUN, message["run"])
            elif "beat" in message:
                keeper.note(message["beat"])
            elif "result" in message:
                return message["result"]
            elif "refused" in message:
                raise TrustError(message["refused"])
            elif "error" in message:
                raise ReleasedError(message["error"], message.get("traceback"))
            elif "unusable" in message:
                raise ReleasedError(message["unusable"])
            elif "interrupted" in message and until is None:
                time.sleep(SIGNAL_SECONDS)  # perhaps by a signal that has yet to come here
                raise ForkError("what starts the tasks' processes was ended.")
            elif "interrupted" in message:
                raise KeyboardInterrupt
    return None


def _environment() -> dict[str, str]:
    given = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if trusted_packages():
        given[TRUSTED_VARIABLE] = ",".join(trusted_packages())
    if session().tracking_uri:
        given["MLFLOW_TRACKING_URI"] = str(session().tracking_uri)
    return given
