"""A worker's training process, seen from its supervisor."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qtorch.task.forked import TRAINING, Forks, Message

log = logging.getLogger(__name__)

CHILD = "qtorch.task.child.work_here"
PING = b'{"alive": 1}\n'
END_SECONDS = 5.0  # for a child that has nothing more to do


class Children:
    """Where a worker's processes come from: forked, so that none repeats the imports.

    `functions`: the dotted names of what they will do. For qtorch's own what trainings need is
    imported beforehand; a user's is imported by each child, for it might not survive a fork.
    """

    def __init__(self, functions: Collection[str] = ()) -> None:
        ours = all(name.startswith("qtorch.") for name in functions)
        self._modules = TRAINING if ours else ()
        self._forks: list[Forks] = []  # the last one is in use, the others begin nothing more
        self._lock = threading.Lock()

    def start(
        self, environment: Mapping[str, str], silence: float, output: Path | None = None
    ) -> ChildProcess:
        """A new one. Raises ForkError where there can be none."""
        with self._lock:
            if not self._forks or self._forks[-1].lost or self._forks[-1].stopped:
                self._forks.append(Forks(*self._modules))
            return ChildProcess(self._forks[-1], environment, silence, output)

    def close(self) -> None:
        """No child is begun any more; what still works is stopped."""
        with self._lock:
            while self._forks:
                self._forks.pop().close()


class ChildProcess:
    """One process of `qtorch.task.child`, in a session of its own, with a pipe for commands.

    `environment` is added to this process's; `output` is a file for what it prints, else it
    prints where this process does. `silence`: see the child.
    """

    def __init__(
        self,
        forks: Forks,
        environment: Mapping[str, str],
        silence: float,
        output: Path | None = None,
    ) -> None:
        self._forks = forks
        self._lock = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as theirs:
            commands, self._commands = os.pipe()
            theirs.callback(os.close, commands)
            printed = (1, 2)
            if output is not None:
                file = theirs.enter_context(output.open("ab")).fileno()
                printed = (file, file)
            try:
                self._fork = forks.fork(
                    CHILD,
                    {"silence": silence},
                    environment=environment,
                    descriptors=(*printed, commands),
                )
            except BaseException:
                os.close(self._commands)
                raise

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self._fork.ended is not None

    def say(self, message: Mapping[str, Any]) -> bool:
        """A line to the child; False where it is gone."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                while line and not self._closed:
                    line = line[os.write(self._commands, line) :]
            except OSError as error:
                log.debug("the child takes no message: %s", error)
                return False
        return not line

    def ping(self) -> None:
        """Say that this process lives; a child that does not listen is not waited for."""
        with self._lock:
            if not self._closed and select.select([], [self._commands], [], 0)[1]:
                try:
                    os.write(self._commands, PING)  # short: a writable pipe takes it at once
                except OSError as error:
                    log.debug("the child takes no message: %s", error)

    def messages(self, patience: float) -> list[Message] | None:
        """What it has said, waited for at most `patience` seconds; None once it is gone."""
        messages = self._fork.receive(patience)
        if self._fork.ended is not None and self._fork.ended.refused:
            self._forks.stopped = True  # a scheduler's signal reached it alone
        return messages or (None if self.gone else [])

    def how_it_ended(self) -> str:
        """`was ended by SIGKILL`, `ended with code 1` and so on, for a child that is gone."""
        return "works" if self._fork.ended is None else self._fork.ended.how

    @property
    def refused(self) -> bool:
        """Whether it was never begun, for the process that begins them was told to stop."""
        return self._fork.ended is not None and self._fork.ended.refused

    def kill(self) -> None:
        """End it and what it has started, now."""
        self._forks.kill(self._fork)
        self._close()

    def finish(self) -> None:
        """Let it end by itself, for it has nothing more to do; else kill it."""
        self._close()
        end = time.monotonic() + END_SECONDS
        while not self.gone and time.monotonic() < end:
            self._fork.receive(END_SECONDS)
        self.kill()

    def _close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._commands)
