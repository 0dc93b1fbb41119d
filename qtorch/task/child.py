"""The training process of a worker: runs tasks for its supervisor, one after another.

Started as `python -m qtorch.task.child COMMANDS REPLIES SILENCE`: two file descriptors that carry
lines of JSON, and the seconds after which a supervisor that says nothing counts as gone. The
supervisor says `alive` all the time. When it is gone (its end of the pipe closes, or it is
silent for that long) another worker will get the task, so this process ends at once: nothing
may write into the run beside the next attempt.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any

from qtorch.core.errors import QtorchError, TrustError
from qtorch.core.heartbeat import RUN, beat, listening
from qtorch.core.names import locate
from qtorch.core.runtime import configure_logging
from qtorch.core.stops import NOTICES, answered
from qtorch.core.trust import check_config
from qtorch.task.definition import decode_result, encode_result

log = logging.getLogger(__name__)

ORPHANED = 97  # the exit code of a child whose supervisor is gone


class Stops:
    """SIGTERM or SIGUSR1, however often and by whom they are sent, interrupt the work once.

    A scheduler signals every process of a job and the supervisor tells its child too; what a
    training takes as a second signal would end it without a checkpoint. Python notes each signal
    in the wakeup pipe, whoever handles it.
    """

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in NOTICES:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
        self._count = 0
        self._raised = False
        self._lock = threading.Lock()

    def told(self) -> int:
        """How many of them came."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                self._count += sum(number in NOTICES for number in os.read(self._read, 4096))
            return self._count

    def stop(self) -> None:
        """Interrupt the main thread, unless it has been already."""
        main = threading.main_thread().ident
        if self.told() == 0 and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._raised and answered() is None:
            self._raised = True
            raise KeyboardInterrupt("the worker was asked to stop")


class Link:
    """The two pipes to the supervisor."""

    def __init__(self, commands: int, replies: int, silence: float, stops: Stops) -> None:
        self._commands, self._replies = commands, replies
        self._silence, self._stops = silence, stops
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        self.busy = False

    def start(self) -> None:
        """Listen from now on."""
        for work in (self._listen, self._watch):
            threading.Thread(target=work, daemon=True, name=f"link-{work.__name__}").start()

    def request(self) -> dict[str, Any] | None:
        """The next task; None at the end."""
        self.busy = False
        request = self._requests.get()
        self.busy = request is not None
        return request

    def say(self, message: Mapping[str, Any]) -> None:
        """A line to the supervisor."""
        line = json.dumps(message, default=str).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._replies, line) :]

    def beat(self, stage: str, details: dict[str, Any]) -> None:
        """The listener of heartbeats."""
        if stage == RUN:
            self.say({"run": details})
        else:
            self.say({"beat": {"stage": stage, **details}})

    def _listen(self) -> None:
        try:
            with os.fdopen(self._commands, "rb") as lines:
                for line in lines:
                    self._heard = time.monotonic()
                    command = json.loads(line)
                    if command.get("stop"):
                        self._stops.stop()
                    elif "func" in command:
                        self._requests.put(command)
        finally:
            self._gone()

    def _watch(self) -> None:
        while time.monotonic() - self._heard < self._silence:
            time.sleep(0.2)
        self._gone()

    def _gone(self) -> None:
        if self.busy:
            self._say_goodbye()
            _end_group()
        self._requests.put(None)

    def _say_goodbye(self) -> None:
        """A supervisor that was only stopped for a while learns that the task is not to blame."""
        if self._lock.acquire(timeout=0.1):
            os.set_blocking(self._replies, False)
            with contextlib.suppress(OSError):
                os.write(self._replies, b'{"interrupted": true}\n')


def _end_group() -> None:
    """End this process and what it has started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(ORPHANED)


def answer(request: Mapping[str, Any], stops: Stops, link: Link) -> dict[str, Any]:
    """Run one task; how it ended, as the supervisor is told.

    One of `{"result": JSON}`, `{"error": text, "traceback": text}`, `{"interrupted": true}`,
    `{"refused": text}` (it names what is not trusted, or what there is not: no use in trying
    again), `{"unusable": text}` (this process cannot work, which is not the task's fault). Once
    the work has begun `{"ready": true}` is said before.
    """
    try:
        beat("importing")
        function = locate(request["func"])
    except KeyboardInterrupt:
        return {"interrupted": True}
    except BaseException as error:
        return {"unusable": f"{request['func']} cannot be used here: {one_line(error)}"}
    try:
        link.say({"ready": True})
        definition = request["definition"]
        try:
            check_config(definition)
        except QtorchError as error:
            return {"refused": str(error)}
        earlier = request.get("res")
        first = definition if earlier is None else decode_result(json.dumps(earlier))
        options = taken_by(function, request["options"])
        return {"result": json.loads(encode_result(function(first, **options)))}
    except TrustError as error:
        return {"refused": str(error)}
    except BaseException as error:
        if not isinstance(error, Exception) and stops.told():
            return {"interrupted": True}
        return {"error": one_line(error), "traceback": traceback.format_exc()}


def taken_by(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function takes; those without a value are left out."""
    given = {k: v for k, v in options.items() if v is not None}
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return given
    return {k: v for k, v in given.items() if k in {p.name for p in parameters}}


def one_line(error: BaseException) -> str:
    """The message of an error of ours, type and message of any other."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QtorchError) and text else f"{type(error).__name__}: {text}"


def main(argv: list[str]) -> int:
    """Work until the supervisor has no more."""
    stops = Stops()
    link = Link(int(argv[0]), int(argv[1]), float(argv[2]), stops)
    link.start()
    configure_logging(os.environ.get("QTORCH_WORKER_LOG", "INFO"))
    try:
        with listening(link.beat):
            while (request := link.request()) is not None:
                told = answer(request, stops, link)
                link.say(told)
                if request.get("last") or not {"result", "refused"} & told.keys():
                    break  # memory goes back whole; after an error nothing is taken for granted
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    except BrokenPipeError:
        return ORPHANED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
