"""The child process of a worker: runs tasks for its supervisor, one after another.

It is forked from the fork server with a pipe on which the supervisor sends lines of JSON, among
them regular `alive` messages. If the supervisor is gone (its end of the pipe is closed, or it was
silent for too long), another worker will claim the task. This process then kills itself, because
it must not write to the run while the next attempt does.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import QtorchError, TrustError
from qtorch.core.heartbeat import RUN, beat, listen
from qtorch.core.names import locate
from qtorch.core.runtime import configure_logging
from qtorch.core.stops import StopHandler
from qtorch.core.trust import check_config_trust
from qtorch.task.definition import decode_result, encode_result

if TYPE_CHECKING:
    from qtorch.task.zygote import Reply

log = logging.getLogger(__name__)


class Link:
    """The pipe from the supervisor, and the connection to it (`qtorch.task.zygote.Reply`).

    `silence_timeout`: seconds without a message after which the supervisor counts as gone.
    `last_alive`: when the supervisor was last alive, by the machine's monotonic clock. Its messages
    carry this time too, because they may have waited in the pipe.
    """

    def __init__(
        self, commands: int, silence_timeout: float, last_alive: float, reply: Reply
    ) -> None:
        self._commands, self._silence_timeout, self._reply = commands, silence_timeout, reply
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last_alive = last_alive
        self._is_closed = False
        self.is_busy = False

    def start(self) -> None:
        """Start the threads that read commands and watch the supervisor."""
        for function in (self._read_commands, self._watch_supervisor):
            threading.Thread(target=function, daemon=True, name=f"link-{function.__name__}").start()

    def next_request(self) -> dict[str, Any] | None:
        """Wait for the next task; return None when there are no more."""
        self.is_busy = False
        request = self._requests.get()
        self.is_busy = request is not None
        return None if self._is_closed else request

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the supervisor."""
        self._reply(message)

    def beat(self, stage: str, details: dict[str, Any]) -> None:
        """Forward a heartbeat to the supervisor (a listener of `qtorch.core.heartbeat`)."""
        if stage == RUN:
            self.send({"run": details})
        else:
            self.send({"beat": {"stage": stage, **details}})

    def _read_commands(self) -> None:
        try:
            with os.fdopen(self._commands, "rb") as lines:
                for line in lines:
                    command = json.loads(line)
                    self._last_alive = max(self._last_alive, command.get("alive", 0.0))
                    if command.get("stop"):
                        self._reply.stop_handler.interrupt()
                    elif "func" in command:
                        self._requests.put(command)
        finally:
            self._close()

    def _watch_supervisor(self) -> None:
        while True:
            time.sleep(0.2)  # messages that wait in the pipe must be read first
            if time.monotonic() - self._last_alive > self._silence_timeout:
                self._close()
                return

    def _close(self) -> None:
        self._is_closed = True
        if self.is_busy:
            # If the supervisor was only paused, this tells it that the task did not fail by itself.
            self._reply.try_send({"interrupted": True})
            _kill_process_group()
        self._requests.put(None)


def _kill_process_group() -> None:
    """Kill this process and the processes that it has started; a forked child leads its group."""
    os.killpg(0, signal.SIGKILL)


def run_request(
    request: Mapping[str, Any], stop_handler: StopHandler, link: Link
) -> dict[str, Any]:
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
        link.send({"ready": True})
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
        if not isinstance(error, Exception) and stop_handler.count_signals():
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


def serve_tasks(request: Mapping[str, Any], reply: Reply) -> int:
    """Run tasks until the supervisor has no more; called by the fork server in a child."""
    link = Link(reply.descriptors[0], request["silence_timeout"], request["last_alive"], reply)
    try:
        link.start()
        configure_logging(os.environ.get("QTORCH_WORKER_LOG", "INFO"))
        with listen(link.beat):
            while (task := link.next_request()) is not None:
                outcome = run_request(task, reply.stop_handler, link)
                link.send(outcome)
                if task.get("last") or not {"result", "refused"} & outcome.keys():
                    break  # exit to free all memory; after an error, also to drop corrupt state
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    atexit._run_exitfuncs()  # ends runs that a user's function left open; os._exit would not
    return 0
