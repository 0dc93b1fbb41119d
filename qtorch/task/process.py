"""A worker's child process, seen from its supervisor."""

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

from qtorch.task.forked import CLOSE_SECONDS, TRAINING_MODULES, ForkServerClient, Message

log = logging.getLogger(__name__)

CHILD_FUNCTION = "qtorch.task.child.serve_tasks"
END_SECONDS = 5.0  # for a child without further work to exit
SEND_SECONDS = 1.0  # default time for a child to accept a message
POLL_SECONDS = 0.2
SIGNAL_SECONDS = 1.0  # a scheduler signals every process; the child may get its signal first
FENCE_FRACTION = 0.8  # of the lease: a child kills itself after that time of silence


class ChildLauncher:
    """Starts the child processes of a worker, forked so that none repeats the imports.

    `functions` are the import paths of the functions that run tasks. If all are qtorch's own, the
    fork server imports what trainings need. A user's function is imported by each child, because
    its modules might not survive a fork. `output` is a file for the output of the fork server.
    """

    def __init__(self, functions: Collection[str] = (), output: Path | None = None) -> None:
        is_own = bool(functions) and all(name.startswith("qtorch.") for name in functions)
        self._modules = TRAINING_MODULES if is_own else ()
        self._output = output
        self._servers: list[ForkServerClient] = []  # only the last one starts new children
        self._lock = threading.Lock()

    def start(
        self, environment: Mapping[str, str], silence_timeout: float, output: Path | None = None
    ) -> ChildProcess:
        """Start a child process; raise ForkError if that is impossible."""
        with self._lock:
            while self._servers and self._servers[-1].has_exited:
                self._servers.pop().close()
            if not self._servers or self._servers[-1].is_stopped:
                self._servers.append(ForkServerClient(*self._modules, output=self._output))
            server = self._servers[-1]
        return ChildProcess(server, environment, silence_timeout, output)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Stop the fork servers and the children that still run, within `timeout` seconds each."""
        with self._lock:
            while self._servers:
                self._servers.pop().close(timeout)


class ChildProcess:
    """A process that runs `qtorch.task.child.serve_tasks`, in its own session, with a command pipe.

    `environment` is added to that of this process. `output` is a file for the child's output, which
    else goes to the output of this process. `silence_timeout`: see `qtorch.task.child.Link`.
    """

    def __init__(
        self,
        server: ForkServerClient,
        environment: Mapping[str, str],
        silence_timeout: float,
        output: Path | None = None,
    ) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._is_closed = False
        folder = os.getcwd()  # importable, as with `python -m`
        path = sys.path if folder in sys.path else [folder, *sys.path]
        with contextlib.ExitStack() as stack:
            commands, self._commands = os.pipe()
            stack.callback(os.close, commands)
            os.set_blocking(self._commands, False)
            output_descriptors = (1, 2)
            if output is not None:
                file = stack.enter_context(output.open("ab")).fileno()
                output_descriptors = (file, file)
            try:
                self._call = server.fork(
                    CHILD_FUNCTION,
                    {"silence_timeout": silence_timeout, "last_alive": time.monotonic()},
                    environment=environment,
                    path=path,
                    descriptors=(*output_descriptors, commands),
                )
            except BaseException:
                os.close(self._commands)
                raise

    @property
    def is_started(self) -> bool:
        """Whether the fork server has reported the child's process id."""
        return self._call.pid is not None

    @property
    def has_ended(self) -> bool:
        """Whether the child's end has been reported."""
        return self._call.exit_status is not None

    def send(
        self,
        message: Mapping[str, Any],
        timeout: float = SEND_SECONDS,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Send a message to the child; return False if it does not accept it in time or is gone."""
        line = json.dumps(message).encode() + b"\n"
        end = time.monotonic() + timeout
        with self._lock:
            try:
                while (
                    line and not self._is_closed and time.monotonic() < end and not is_cancelled()
                ):
                    if select.select([], [self._commands], [], min(timeout, POLL_SECONDS))[1]:
                        line = line[os.write(self._commands, line) :]
            except OSError as error:
                log.debug("cannot send a message to the child: %s", error)
                return False
        return not line

    def ping(self) -> None:
        """Tell the child that this process is alive, without waiting for it to read the message."""
        if not self._lock.acquire(blocking=False):
            return  # another thread sends a message or closes the pipe
        try:
            if not self._is_closed and select.select([], [self._commands], [], 0)[1]:
                # The message is short, so a writable pipe accepts it as a whole.
                os.write(self._commands, f'{{"alive": {time.monotonic()}}}\n'.encode())
        except OSError as error:
            log.debug("cannot send a message to the child: %s", error)
        finally:
            self._lock.release()

    def receive(self, timeout: float) -> list[Message] | None:
        """Return the child's new messages; wait up to `timeout` seconds. None if it has ended."""
        messages = self._call.receive(timeout)
        if self._call.exit_status is not None and self._call.exit_status.is_refused:
            self._server.is_stopped = True  # only the server got a scheduler's signal
        return messages or (None if self.has_ended else [])

    def describe_exit(self) -> str:
        """Return a phrase such as `was killed by SIGKILL` or `exited with code 1`."""
        return (
            "is running" if self._call.exit_status is None else self._call.exit_status.description
        )

    @property
    def is_server_failure(self) -> bool:
        """Whether the child ended because the fork server refused to start it, or is gone."""
        return self._call.exit_status is not None and self._call.exit_status.code is None

    def stop_server(self) -> None:
        """End the fork server, which has not started this child in time."""
        self._server.is_stopped = True
        self._server.close(0.0)

    def kill(self) -> None:
        """Kill the child and the processes that it has started."""
        self._server.kill(self._call)
        self._close()

    def finish(self) -> None:
        """Let the child exit by itself, and kill it if it does not within END_SECONDS."""
        self._close()
        end = time.monotonic() + END_SECONDS
        while not self.has_ended and time.monotonic() < end:
            self._call.receive(END_SECONDS)
        self.kill()

    def _close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._commands)
