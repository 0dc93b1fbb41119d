"""Work in processes of its own, each forked from a zygote that has its imports done.

The owner starts the zygote; other processes of the machine (the workers of a parallel launcher)
find it by its address and share it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtorch.core.errors import QtorchError

log = logging.getLogger(__name__)

START_SECONDS = 60.0  # until the zygote listens, which it does before its imports
ZYGOTE_MODULE = "qtorch.trainer.zygote"


class ForkError(QtorchError, RuntimeError):
    """The zygote does not answer."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that ended it.

    None: the zygote itself is gone. `refused`: nothing was begun, for the zygote was stopped.
    """

    code: int | None
    refused: bool = False

    @property
    def how(self) -> str:
        """`was ended by SIGKILL`, `ended with code 1` and so on."""
        if self.refused:
            return "was not begun"
        if self.code is None:
            return "was lost with the process that had started it"
        if self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name}"
        return f"ended with code {self.code}"


class Forks:
    """A zygote of this process's own; it ends with this process, or with `close`.

    `modules` are imported in it beside what every training needs.
    """

    def __init__(self, *modules: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="qtorch-")  # of this user alone
        self.address = os.path.join(self._folder, "zygote")
        self.stopped = False
        self.busy = False  # whether this process waits for a call
        theirs, self._orders = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ZYGOTE_MODULE, self.address, str(theirs), *modules],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs,),
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            )
        finally:
            os.close(theirs)
        self._owner = os.getpid()

    @property
    def open(self) -> bool:
        """Whether it has not been closed."""
        return self._orders >= 0

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        tell: Callable[[dict[str, Any]], None] = lambda message: None,
    ) -> Ended:
        """`call_at` here. Ctrl-C (or what else interrupts) stops the child, waits, and passes."""
        self.busy = True
        try:
            return call_at(self.address, function, request, tell, interrupted=self.stop)
        finally:
            self.busy = False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send every child a signal, once; no further work is begun."""
        self.stopped = True
        if self._orders >= 0:
            with contextlib.suppress(OSError):
                os.write(self._orders, f"{int(number)}\n".encode())

    def close(self) -> None:
        """End the zygote; what still runs is stopped first."""
        if self._orders >= 0 and os.getpid() == self._owner:
            os.close(self._orders)
            self._orders = -1
            self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)


def call_at(
    address: str,
    function: str,
    request: Mapping[str, Any],
    tell: Callable[[dict[str, Any]], None] = lambda message: None,
    *,
    interrupted: Callable[[], None] | None = None,
) -> Ended:
    """Have a zygote's child call `function(request, tell)`; wait for its end.

    `function` is a dotted name; `request` goes as JSON. The child has this process's folder,
    environment, `sys.path`, `sys.argv` and standard output. What it tells comes here as it is
    told. `interrupted` is called where this process is interrupted meanwhile, and the
    interruption raised again once the child has ended. Raises ForkError where no zygote answers.
    """
    message = {
        "function": function,
        "request": request,
        "environment": dict(os.environ),
        "path": sys.path,
        "argv": sys.argv,
        "folder": os.getcwd(),
    }
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    stop: BaseException | None = None
    ended = Ended(None)
    with _connected(address) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused: see the answer
            socket.send_fds(connection, [b"+"], [1, 2])
            connection.sendall(json.dumps(message, default=str).encode() + b"\n")
        buffer = b""
        while True:
            try:
                data = connection.recv(65536)
            except ConnectionResetError:
                data = b""
            except (KeyboardInterrupt, SystemExit) as error:
                if interrupted is None:
                    raise
                if stop is None:
                    interrupted()
                stop = stop or error
                continue
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for told in map(json.loads, lines):
                if "ended" in told:
                    ended = Ended(told["ended"])
                elif "refused" in told:
                    ended = Ended(None, refused=True)
                else:
                    tell(told)
    if stop is not None:
        raise stop
    return ended


def _connected(address: str) -> socket.socket:
    end = time.monotonic() + START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if not Path(address).parent.is_dir() or time.monotonic() > end:
                raise ForkError(
                    f"the process that starts the others does not answer ({error}); a sweep does "
                    "without it by sweep.isolate=false, a trainer by call_in_subproc=False."
                ) from error
            time.sleep(0.02)
            continue
        return connection
