"""A worker's training process, seen from its supervisor."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CHILD_MODULE = "qtorch.task.child"
PING = b'{"alive": 1}\n'
END_SECONDS = 5.0  # for a child that has nothing more to do


class ChildProcess:
    """One process of `qtorch.task.child`, in a session of its own, with a pipe each way.

    `environment` is added to this process's; `output` is a file for what it prints, else it
    prints where this process does. `silence`: see the child.
    """

    def __init__(
        self, *, environment: Mapping[str, str], silence: float, output: Path | None = None
    ) -> None:
        their_commands, self._commands = os.pipe()
        self._replies, their_replies = os.pipe()
        os.set_blocking(self._replies, False)
        self._lock = threading.Lock()
        self._buffer = b""
        self._closed = False
        file = None if output is None else output.open("ab")
        command = [sys.executable, "-m", CHILD_MODULE, str(their_commands), str(their_replies)]
        try:
            self.process = subprocess.Popen(
                [*command, str(silence)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=(their_commands, their_replies),
                start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
            )
        finally:
            os.close(their_commands)
            os.close(their_replies)
            if file is not None:
                file.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def say(self, message: Mapping[str, Any]) -> bool:
        """A line to the child; False where it is gone."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                while line and not self._closed:
                    line = line[os.write(self._commands, line) :]
            except OSError as error:
                log.debug("the child %d takes no message: %s", self.pid, error)
                return False
        return not line

    def ping(self) -> None:
        """Say that this process lives; a child that does not listen is not waited for."""
        with self._lock:
            if not self._closed and select.select([], [self._commands], [], 0)[1]:
                try:
                    os.write(self._commands, PING)  # short: a writable pipe takes it at once
                except OSError as error:
                    log.debug("the child %d takes no message: %s", self.pid, error)

    def messages(self, patience: float) -> list[dict[str, Any]] | None:
        """What it has said, waited for at most `patience` seconds; None once it is gone."""
        if not select.select([self._replies], [], [], patience)[0]:
            return []
        data = os.read(self._replies, 65536)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def how_it_ended(self) -> str:
        """`was ended by SIGKILL` or `ended with code 1`, for a child whose pipe is closed."""
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipe"
        return (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )

    def kill(self) -> None:
        """End it and what it has started, now."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            log.debug("the child %d is gone already", self.pid)
        self.process.wait()
        with self._lock:
            self._close()
            if self._replies >= 0:
                os.close(self._replies)
                self._replies = -1

    def finish(self) -> None:
        """Let it end by itself, for it has nothing more to do; else kill it."""
        with self._lock:
            self._close()
        end = time.monotonic() + END_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        self.kill()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._commands)
