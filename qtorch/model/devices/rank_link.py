"""A rank's two pipes to its parent process, which carry lines of JSON. Does not import torch."""

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

from qtorch.model.loop.interruption import StopRequest
from qtorch.process.stops import STOP_SIGNALS

ORPHAN_EXIT_CODE = 97  # exit code of a rank whose parent process has died
STOP = b"stop"


class RankLink(StopRequest):
    """Send the rank's messages, receive stop requests, and exit when the parent dies.

    The parent's end of `commands` (stdin) is closed when the parent is gone, for whatever reason.
    Stop signals are ignored here and handled by the parent, because schedulers and terminals send
    them to every process.
    """

    def __init__(self, replies: int, commands: int = 0) -> None:
        super().__init__()
        self._replies, self._commands = replies, commands
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Start listening for commands."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._read_commands, daemon=True, name="rank-link").start()

    def send(self, **message: Any) -> None:
        """Send one message to the parent."""
        line = json.dumps(message, default=str).encode() + b"\n"
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._replies, line) :]
        except BrokenPipeError:
            kill_process_group()

    def send_heartbeat(self, stage: str, details: dict[str, Any]) -> None:
        """Send a heartbeat; used as a heartbeat listener."""
        self.send(beat=[stage, details])

    def _read_commands(self) -> None:
        with os.fdopen(self._commands, "rb") as lines:
            for line in lines:
                if line.strip() == STOP:
                    self.stop_requested = True
        kill_process_group()


class LinkLogHandler(logging.Handler):
    """A logging handler that sends log lines to the parent."""

    def __init__(self, link: RankLink, level: int) -> None:
        super().__init__(level)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        self._link.send(log=[record.name, record.levelno, text])


class LinkRecorder:
    """A stand-in for the parent's recorder that sends metrics and tags to it."""

    def __init__(self, link: RankLink, run_id: str, uri: str | None = None) -> None:
        self._link, self.id, self.uri = link, run_id, uri

    def log_batch(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics to the parent, which logs them."""
        self._link.send(metrics=[dict(metrics), step])

    def set_tags(self, **tags: Any) -> None:
        """Send tags to the parent, which sets them."""
        self._link.send(tags=tags)


def serialize_error(error: BaseException) -> dict[str, Any]:
    """Return an error as plain values; the exception itself too if it can be pickled."""
    try:
        pickled_error = base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # pickling runs arbitrary code of the exception's class
        pickled_error = ""
    lines = traceback.format_exception(error)
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(lines),
        "pickle": pickled_error,
    }


def kill_process_group() -> None:
    """Kill this process and its children immediately."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(ORPHAN_EXIT_CODE)
