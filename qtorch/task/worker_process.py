"""A child process that runs the tasks of a pool, for `qtorch worker` and `run_task`."""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qtorch.core.errors import QtorchError, TrustError
from qtorch.core.names import locate
from qtorch.core.runtime import configure_logging
from qtorch.core.trust import check_config_trust
from qtorch.process.child import Child, Parent
from qtorch.process.fork_server import TRAINING_PRELOAD, ForkServer, fork_server
from qtorch.process.heartbeat import RUN, beat, listen
from qtorch.process.stops import received_signals
from qtorch.task.definition import decode_result, encode_result

log = logging.getLogger(__name__)

SIGNAL_SECONDS = 1.0  # a scheduler signals every process; the child may get its signal first
FENCE_FRACTION = 0.8  # of the lease: a child kills itself after that time of silence


def task_fork_server(functions: Collection[str]) -> ForkServer:
    """Return the fork server for tasks that are run by these functions, named by import path.

    If all are qtorch's own, it imports what trainings need. A user's function is imported by each
    child, because its modules might not survive a fork.
    """
    is_own = bool(functions) and all(name.startswith("qtorch.") for name in functions)
    return fork_server(*([TRAINING_PRELOAD] if is_own else []))


def start_child(
    server: ForkServer,
    environment: Mapping[str, str],
    lease: float,
    output: Path | None = None,
) -> Child:
    """Start a child that runs `serve_tasks`; `environment` is added to that of this process.

    The child ends itself before another worker can claim its task, because the lease has expired.
    """
    folder = os.getcwd()  # importable, as with `python -m`
    return server.start(
        f"{__name__}.serve_tasks",
        {},
        environment={**os.environ, **environment},
        path=sys.path if folder in sys.path else [folder, *sys.path],
        output=output,
        orphan_seconds=0.0,
        silence_timeout=FENCE_FRACTION * lease,
    )


def serve_tasks(request: Mapping[str, Any], parent: Parent) -> int:
    """Run tasks until the parent has no more; called by the fork server in a child."""

    def report_beat(stage: str, details: dict[str, Any]) -> None:
        parent.send({"run": details} if stage == RUN else {"beat": {"stage": stage, **details}})

    try:
        configure_logging(os.environ.get("QTORCH_WORKER_LOG", "INFO"))
        with listen(report_beat):
            while (task := parent.next_request()) is not None:
                outcome = run_request(task, parent)
                parent.send(outcome)
                if task.get("last") or not {"result", "refused"} & outcome.keys():
                    break  # exit to free all memory; after an error, also to drop corrupt state
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    parent.is_idle = True
    atexit._run_exitfuncs()  # ends runs that a user's function left open; os._exit would not
    return 0


def run_request(request: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
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
        definition = request["definition"]
        try:
            check_config_trust(definition)
        except QtorchError as error:
            return {"refused": str(error)}
        stored_result = request.get("res")
        first = definition if stored_result is None else decode_result(json.dumps(stored_result))
        options = filter_options(function, request["options"])
        return {"result": json.loads(encode_result(function(first, **options)))}
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
    """Return the message of a qtorch error, or type and message of another error, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QtorchError) and text else f"{type(error).__name__}: {text}"
