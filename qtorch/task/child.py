"""The training process of a worker: runs tasks for its supervisor, one after another.

Forked from a zygote with a pipe along which its supervisor sends lines of JSON; it says `alive`
all the time. When it is gone (its end of the pipe closes, or it is silent for so long) another
worker will get the task, so this process ends at once: nothing may write into the run beside the
next attempt.
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
from qtorch.core.heartbeat import RUN, beat, listening
from qtorch.core.names import locate
from qtorch.core.runtime import configure_logging
from qtorch.core.stops import Stops
from qtorch.core.trust import check_config
from qtorch.task.definition import decode_result, encode_result

if TYPE_CHECKING:
    from qtorch.task.zygote import Asker

log = logging.getLogger(__name__)


class Link:
    """The pipe from the supervisor, and the connection to it (`qtorch.task.zygote.Asker`).

    `silence`: seconds without a word after which the supervisor counts as gone; `heard`: when it
    was there, by the machine's monotonic clock, which its words carry too (they may have waited).
    """

    def __init__(self, commands: int, silence: float, heard: float, asker: Asker) -> None:
        self._commands, self._silence, self._asker = commands, silence, asker
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._heard = heard
        self._over = False
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
        return None if self._over else request

    def say(self, message: Mapping[str, Any]) -> None:
        """Something to the supervisor."""
        self._asker(message)

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
                    command = json.loads(line)
                    self._heard = max(self._heard, command.get("alive", 0.0))
                    if command.get("stop"):
                        self._asker.stops.stop()
                    elif "func" in command:
                        self._requests.put(command)
        finally:
            self._gone()

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)  # what has waited in the pipe is heard first
            if time.monotonic() - self._heard > self._silence:
                self._gone()
                return

    def _gone(self) -> None:
        self._over = True
        if self.busy:
            # A supervisor that was only stopped for a while learns that the task is not to blame.
            self._asker.try_to_say({"interrupted": True})
            _end_group()
        self._requests.put(None)


def _end_group() -> None:
    """End this process and what it has started; a zygote's child leads its group."""
    os.killpg(0, signal.SIGKILL)


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


def work_here(request: Mapping[str, Any], asker: Asker) -> int:
    """Work until the supervisor has no more; in a zygote's child."""
    link = Link(asker.descriptors[0], request["silence"], request["heard"], asker)
    try:
        link.start()
        configure_logging(os.environ.get("QTORCH_WORKER_LOG", "INFO"))
        with listening(link.beat):
            while (task := link.request()) is not None:
                told = answer(task, asker.stops, link)
                link.say(told)
                if task.get("last") or not {"result", "refused"} & told.keys():
                    break  # memory goes back whole; after an error nothing is taken for granted
    except KeyboardInterrupt:
        log.debug("stopped while idle")
    atexit._run_exitfuncs()  # a run that a user's function left open is ended; a fork would not
    return 0
