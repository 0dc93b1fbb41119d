"""A rank's two pipes to the process that started it: lines of JSON. Needs no torch."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import cloudpickle

from qtorch.core.stops import STOPS
from qtorch.model.interruption import Stoppable

ORPHANED = 97  # the exit code of a rank whose parent is gone
STOP = b"stop"


class RankLink(Stoppable):
    """Says what the rank has to say, hears when it is to stop, and ends it without its parent.

    The parent's end of `commands` (stdin) closes when the parent is gone, however it went.
    Signals are the parent's affair: a scheduler or a terminal sends them to every process.
    """

    def __init__(self, replies: int, commands: int = 0) -> None:
        super().__init__()
        self._replies, self._commands = replies, commands
        self._lock = threading.Lock()

    def listen(self) -> None:
        """From now on."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._hear, daemon=True, name="rank-link").start()

    def say(self, **message: Any) -> None:
        """A line to the parent."""
        line = json.dumps(message, default=str).encode() + b"\n"
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._replies, line) :]
        except BrokenPipeError:
            end_group()

    def beat(self, stage: str, details: dict[str, Any]) -> None:
        """The listener of heartbeats."""
        self.say(beat=[stage, details])

    def _hear(self) -> None:
        with os.fdopen(self._commands, "rb") as lines:
            for line in lines:
                if line.strip() == STOP:
                    self.requested = True
        end_group()


class LinkHandler(logging.Handler):
    """Log lines on their way to the parent."""

    def __init__(self, link: RankLink, level: int) -> None:
        super().__init__(level)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        self._link.say(log=[record.name, record.levelno, text])


class LinkRecorder:
    """Stands for the parent's recorder: metrics go there, the run is the parent's."""

    def __init__(self, link: RankLink, run_id: str, uri: str | None = None) -> None:
        self._link, self.id, self.uri = link, run_id, uri

    def log_batch(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Send metrics to the parent, which logs them."""
        self._link.say(metrics=[dict(metrics), step])

    def set_tags(self, **tags: Any) -> None:
        """Send tags to the parent, which sets them."""
        self._link.say(tags=tags)


def told(error: BaseException) -> dict[str, Any]:
    """An error as the parent is told it; the thing itself too, where it can be sent."""
    try:
        sent = base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # whatever its own way to be pickled raises
        sent = ""
    lines = traceback.format_exception(error)
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(lines),
        "pickle": sent,
    }


def end_group() -> None:
    """End this process and what it has started, now."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(ORPHANED)
