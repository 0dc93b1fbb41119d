"""A worker's training process, seen from its supervisor."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from qtorch.task.forked import CLOSE_SECONDS, TRAINING, Forks, Message

log = logging.getLogger(__name__)

CHILD = "qtorch.task.child.work_here"
END_SECONDS = 5.0  # for a child that has nothing more to do
SAY_SECONDS = 1.0  # for a child to take a message, unless more is given
LOOK_SECONDS = 0.2
SIGNAL_SECONDS = 1.0  # a scheduler signals every process, and the child may hear it first
FENCE = 0.8  # of the lease: a child that hears nothing for so long ends itself


class Children:
    """Where a worker's processes come from: forked, so that none repeats the imports.

    `functions`: the dotted names of what they will do. For qtorch's own what trainings need is
    imported beforehand; a user's is imported by each child, for it might not survive a fork.
    `output` is a file for what the imports print.
    """

    def __init__(self, functions: Collection[str] = (), output: Path | None = None) -> None:
        ours = bool(functions) and all(name.startswith("qtorch.") for name in functions)
        self._modules = TRAINING if ours else ()
        self._output = output
        self._forks: list[Forks] = []  # the last one is in use, the others begin nothing more
        self._lock = threading.Lock()

    def start(
        self, environment: Mapping[str, str], silence: float, output: Path | None = None
    ) -> ChildProcess:
        """A new one. Raises ForkError where there can be none."""
        with self._lock:
            while self._forks and self._forks[-1].lost:
                self._forks.pop().close()
            if not self._forks or self._forks[-1].stopped:
                self._forks.append(Forks(*self._modules, output=self._output))
            forks = self._forks[-1]
        return ChildProcess(forks, environment, silence, output)

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """No child is begun any more; what still works is stopped within so many seconds."""
        with self._lock:
            while self._forks:
                self._forks.pop().close(patience)


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
        here = os.getcwd()  # found as by `python -m`
        path = sys.path if here in sys.path else [here, *sys.path]
        with contextlib.ExitStack() as theirs:
            commands, self._commands = os.pipe()
            theirs.callback(os.close, commands)
            os.set_blocking(self._commands, False)
            printed = (1, 2)
            if output is not None:
                file = theirs.enter_context(output.open("ab")).fileno()
                printed = (file, file)
            try:
                self._fork = forks.fork(
                    CHILD,
                    {"silence": silence, "heard": time.monotonic()},
                    environment=environment,
                    path=path,
                    descriptors=(*printed, commands),
                )
            except BaseException:
                os.close(self._commands)
                raise

    @property
    def begun(self) -> bool:
        """Whether it is known to have been forked."""
        return self._fork.pid is not None

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self._fork.ended is not None

    def say(
        self,
        message: Mapping[str, Any],
        patience: float = SAY_SECONDS,
        given_up: Callable[[], bool] = lambda: False,
    ) -> bool:
        """A line to the child; False where it does not take it in time, or is gone."""
        line = json.dumps(message).encode() + b"\n"
        end = time.monotonic() + patience
        with self._lock:
            try:
                while line and not self._closed and time.monotonic() < end and not given_up():
                    if select.select([], [self._commands], [], min(patience, LOOK_SECONDS))[1]:
                        line = line[os.write(self._commands, line) :]
            except OSError as error:
                log.debug("the child takes no message: %s", error)
                return False
        return not line

    def ping(self) -> None:
        """Say that this process lives; a child that does not listen is not waited for."""
        if not self._lock.acquire(blocking=False):
            return  # something is being said, or it is being ended
        try:
            if not self._closed and select.select([], [self._commands], [], 0)[1]:
                # Short: a writable pipe takes it whole.
                os.write(self._commands, f'{{"alive": {time.monotonic()}}}\n'.encode())
        except OSError as error:
            log.debug("the child takes no message: %s", error)
        finally:
            self._lock.release()

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
    def without_cause(self) -> bool:
        """Whether what it was forked from has refused it, or has gone, which is no fault of it."""
        return self._fork.ended is not None and self._fork.ended.code is None

    def disown(self) -> None:
        """End the process that should have forked it, for it does nothing."""
        self._forks.stopped = True
        self._forks.close(0.0)

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
