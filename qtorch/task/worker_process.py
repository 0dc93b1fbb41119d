"""A child process that runs the tasks of a pool, for `qtorch worker` and `run_task`."""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtorch.core.errors import QtorchError, TrustError
from qtorch.core.qlib.translation import check_definition_trust
from qtorch.core.runtime import configure_logging
from qtorch.core.secrets import redact_urls
from qtorch.core.session import WORKER_LOG_VARIABLE
from qtorch.core.trust import as_stored_text, locate
from qtorch.process.child import Child, Message, Parent
from qtorch.process.fork_server import (
    TRAINING_PRELOAD,
    ForkServer,
    current_environment,
    fork_server,
)
from qtorch.process.heartbeat import RUN, beat, listen
from qtorch.process.stops import STOP_SIGNALS, received_signals
from qtorch.task.definition import encode_result, restore_recorders
from qtorch.task.manager import LeaseRenewer
from qtorch.tracking.delivery import wait_for_delivery

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
DELIVERY = "waiting for the tracking server"  # stage of a task whose run is not yet complete
SIGNAL_SECONDS = 1.0  # a scheduler signals every process; the child may get its signal first
FENCE_FRACTION = 0.8  # of the lease: a child kills itself after that time of silence


def task_fork_server(functions: Collection[str]) -> ForkServer:
    """Return the fork server for tasks that are run by these functions, named by import path.

    If all are qtorch's own, it imports what trainings need. A user's function is imported by each
    child, because its modules might not survive a fork.
    """
    is_own = bool(functions) and all(name.startswith("qtorch.") for name in functions)
    return fork_server(*([TRAINING_PRELOAD] if is_own else []))


def start_task_child(
    server: ForkServer,
    environment: Mapping[str, str],
    lease: float,
    output: Path | None = None,
) -> Child:
    """Start a child that runs `serve_tasks`; `environment` is added to that of this process.

    The child ends itself before another worker can claim its task, because the lease has expired.
    """
    folder = os.getcwd()  # importable, as with `python -m`
    is_complete = folder in sys.path or sys.flags.safe_path
    return server.start(
        f"{__name__}.serve_tasks",
        {},
        environment={**current_environment(), **environment},
        sys_path=sys.path if is_complete else [folder, *sys.path],
        output=output,
        orphan_seconds=0.0,
        silence_timeout=FENCE_FRACTION * lease,
    )


def serve_tasks(_: Mapping[str, Any], parent: Parent) -> int:
    """Run tasks until the parent has no more; called by the fork server in a child."""

    def report_beat(stage: str, details: dict[str, Any]) -> None:
        parent.send({"run": details} if stage == RUN else {"beat": {"stage": stage, **details}})

    try:
        configure_logging(os.environ.get(WORKER_LOG_VARIABLE, "INFO"))
        with listen(report_beat):
            while (request := parent.next_request()) is not None:
                try:
                    outcome = serve_request(request, parent)
                except KeyboardInterrupt:  # the stop signal came at its very beginning or end
                    outcome = {"interrupted": True}
                _send_outcome(outcome, parent)
                if not may_reuse_child(outcome, request):
                    break
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    parent.finish_work()
    atexit._run_exitfuncs()  # ends runs that a user's function left open; os._exit would not
    return 0


def _send_outcome(outcome: Message, parent: Parent) -> None:
    """Send the outcome, also if a stop signal comes meanwhile: it is handled afterwards.

    The child counts as idle before the parent has the outcome, because the parent may then close
    the connection; a child that works would be killed at once.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        parent.finish_work()
        parent.send(outcome)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def may_reuse_child(outcome: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether the child can run a further task; otherwise it exits, and the parent drops it.

    It exits after an error too, because the error may have left a corrupt state.
    """
    return not request["last"] and bool({"result", "refused"} & outcome.keys())


@dataclass
class OutcomeWaiter:
    """Waits for the outcome of a request that was sent to a child.

    `on_progress` gets the child's heartbeats. When `is_stopped` returns True the child is stopped,
    with `grace` seconds to write a checkpoint, or none if `is_hurried`.

    Two clocks tell that a child hangs. `qtorch worker` sets `hang_after`, the seconds without a
    message, which also limit the start of the child; the lease is renewed until the task is
    returned. `run_task` gives its `hang_after` to the `LeaseRenewer`, which serves functions in
    this process too, and stops renewing.
    """

    lease: LeaseRenewer
    on_progress: Callable[[Message], None]
    is_stopped: Callable[[], bool] = lambda: False
    is_hurried: Callable[[], bool] = lambda: False
    grace: float = 30.0
    hang_after: float = math.inf

    def wait(self, child: Child) -> dict[str, Any]:
        """Return the child's final message (see `serve_request`), or one of these.

        - `{"died": text}`: the child ended after its task had begun;
        - `{"unusable": text}`: the child ended before that;
        - `{"not_started": text}`: the same, and the fork server is to blame;
        - `{"interrupted": true}`: the child was stopped;
        - `{"lost": true}` and `{"hung": true}`: the child was killed.
        """
        last_sign, stop_time, is_ready = time.monotonic(), math.inf, False
        while True:
            child.ping()
            for message in child.receive(POLL_SECONDS):
                last_sign, is_ready = time.monotonic(), is_ready or "ready" in message
                if not {"beat", "run", "ready"} & message.keys():
                    return message
                self.on_progress(message)
            if child.exit_status is not None:
                was_stopped = stop_time < math.inf
                return {"interrupted": True} if was_stopped else _exit_outcome(child, is_ready)
            if stop_time == math.inf and self.is_stopped():
                stop_time = time.monotonic()
                child.stop()
            outcome = self._reason_to_kill(child, last_sign, stop_time)
            if outcome is not None:
                child.kill()
                return outcome

    def _reason_to_kill(
        self, child: Child, last_sign: float, stop_time: float
    ) -> dict[str, Any] | None:
        now = time.monotonic()
        if self.lease.lease_lost.is_set():
            return {"lost": True}
        if now - stop_time > self.grace or self.is_hurried():
            return {"interrupted": True}
        if now - last_sign <= self.hang_after and not self.lease.work_hung.is_set():
            return None
        if child.pid is None:
            return {"not_started": "the fork server does not respond"}
        return {"hung": True}


def _exit_outcome(child: Child, is_ready: bool) -> dict[str, Any]:
    assert child.exit_status is not None
    text = f"the task's process {child.exit_status.description}"
    if is_ready:
        return {"died": text}
    return {"not_started" if child.exit_status.code is None else "unusable": text}


def serve_request(request: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
    """Run one task and return the message about its outcome.

    The message is one of
    - `{"result": JSON}`;
    - `{"error": text, "traceback": text}`: the task failed;
    - `{"interrupted": true}`;
    - `{"refused": text}`: the definition names something untrusted or nonexistent, so that a
      further attempt is useless;
    - `{"unusable": text}`: this process cannot run tasks, which is not the task's fault.

    `{"ready": true}` is sent before the task's function is called.
    """
    try:
        beat("importing")
        function = locate(request["func"])
    except KeyboardInterrupt:
        return {"interrupted": True}
    except BaseException as error:
        return {"unusable": f"cannot import {request['func']}: {format_error(error)}"}
    try:
        parent.send({"ready": True})
        definition = as_stored_text(request["definition"])
        try:
            check_definition_trust(definition)
        except QtorchError as error:
            return {"refused": str(error)}
        stored_result = as_stored_text(request.get("res"))
        first = definition if stored_result is None else restore_recorders(stored_result)
        options = filter_options(function, request["options"])
        with wait_for_delivery(lambda: beat(DELIVERY)):
            result = function(first, **options)
        return {"result": json.loads(encode_result(result))}
    except TrustError as error:
        return {"refused": str(error)}
    except BaseException as error:
        if not isinstance(error, Exception) and received_signals:
            return {"interrupted": True}
        return {"error": format_error(error), "traceback": traceback.format_exc()}


def filter_options(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None and that a function accepts."""
    values = {k: v for k, v in options.items() if v is not None}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return values
    return {k: v for k, v in values.items() if k in {p.name for p in parameters}}


def format_error(error: BaseException) -> str:
    """Return the message of a qtorch error, or type and message of another error, in one line.

    It has no secrets of URLs.
    """
    text = redact_urls(" ".join(str(error).split()))
    return text if isinstance(error, QtorchError) and text else f"{type(error).__name__}: {text}"
