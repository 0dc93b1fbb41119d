"""Work in processes of its own, each forked from a zygote that has its imports done.

The owner starts the zygote; other processes of the machine (the workers of a parallel launcher)
find it by its address and share it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qtorch.core.errors import QtorchError
from qtorch.task.zygote import FORK, GRACE_SECONDS

log = logging.getLogger(__name__)

START_SECONDS = 60.0  # until the zygote listens, which it does before its imports
PID_SECONDS = 1.0  # until a child that was forked says so
CLOSE_SECONDS = GRACE_SECONDS + 15.0  # until all children have ended, and the zygote
END_SECONDS = 5.0  # until the zygote has ended a child
ZYGOTE_MODULE = "qtorch.task.zygote"
# Torch's way of counting GPUs without a CUDA context, which no fork would survive; and no window,
# nor the backend of a notebook.
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "MPLBACKEND": "Agg"}
TRAINING = (  # what every training needs
    "qtorch.tracking.mlflow_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.utils.name_utils",
    "sqlalchemy.dialects.sqlite",
    "qtorch.model.lightning_model",
    "qtorch.model.fitting",
    "qtorch.data.alpha",
    "qtorch.data.window_dataset",
    "qtorch.nn.lstm",
    "qtorch.record.signal",
    "qtorch.record.segment_ic",
    "qtorch.record.signal_analysis",
    "qtorch.record.ic_chart",
    "qtorch.trainer.run",
    "torch.optim",
    "torch._dynamo",  # an optimizer's first step wants it
    "torch.utils.serialization",
    "torch.profiler._cupti_monitor",
    "pytorch_lightning.callbacks",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pyarrow.pandas_compat",
    "safetensors.torch",
    "rich.progress",
)

Message = dict[str, Any]


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


class Fork:
    """A zygote's child at work, seen from the process that asked for it.

    Asks the zygote at `address` for a call of `function(request, asker)` (see
    `qtorch.task.zygote`). `function` is a dotted name; `request` goes as JSON. The child has this
    process's folder, `sys.path` (unless `path` is given) and `sys.argv`, its environment with
    `environment` added, the first two of `descriptors` as standard output and error, and gets the
    others. Raises ForkError where no zygote answers, at once where `lost` says that there is none.
    """

    def __init__(
        self,
        address: str,
        function: str,
        request: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        path: Sequence[str] | None = None,
        descriptors: Sequence[int] = (1, 2),
        lost: Callable[[], bool] = lambda: False,
    ) -> None:
        message = {
            "function": function,
            "request": request,
            "environment": {**os.environ, **(environment or {})},
            "path": list(sys.path if path is None else path),
            "argv": sys.argv,
            "folder": os.getcwd(),
        }
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        self.pid: int | None = None  # once the child has said it
        self.ended: Ended | None = None
        self._buffer = b""
        self._connection = _connected(address, lost)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused: see the answer
            socket.send_fds(self._connection, [b"+"], list(descriptors))
            self._connection.sendall(json.dumps(message, default=str).encode() + b"\n")

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, patience: float | None = None) -> list[Message]:
        """What the child has told since, waited for at most `patience` seconds (None: for ever).

        Once it has ended `ended` says how.
        """
        if self.ended is not None:
            return []
        if patience is not None and not select.select([self._connection], [], [], patience)[0]:
            return []
        try:
            data = self._connection.recv(65536)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        messages = []
        for told in filter(None, map(_parsed, lines)):
            if FORK in told:
                self._note(told[FORK])
            else:
                messages.append(told)
        if not data:
            self.ended = self.ended or Ended(None)
        return messages

    def _note(self, told: Message) -> None:
        if "pid" in told:
            self.pid = told["pid"]
        elif self.ended is None:
            self.ended = Ended(told.get("ended"), refused=told.get("refused", False))

    def close(self) -> None:
        """Wait no more: a child that still works is stopped, with time for a checkpoint."""
        self._connection.close()


class Forks:
    """A zygote of this process's own; it ends with this process, or with `close`.

    `modules` are imported in it; one that is not there is left out. `output` is a file for what
    it prints itself, else it prints where this process does.
    """

    def __init__(self, *modules: str, output: Path | None = None) -> None:
        self._folder = tempfile.mkdtemp(prefix="qtorch-")  # of this user alone
        self.address = os.path.join(self._folder, "zygote")
        self.stopped = False
        self.busy = False  # whether this process waits for a call
        theirs, self._orders = os.pipe()
        with contextlib.ExitStack() as given:
            given.callback(os.close, theirs)
            file = None if output is None else given.enter_context(output.open("ab"))
            self._process = self._begun([self.address, str(theirs), *modules], theirs, file)
        self._owner = os.getpid()

    def _begun(
        self, arguments: Sequence[str], orders: int, output: IO[bytes] | None
    ) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)  # what is found here is there
        return subprocess.Popen(
            [sys.executable, "-m", ZYGOTE_MODULE, *arguments],
            env={**os.environ, **FORK_SAFE, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(orders,),
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
        )

    @property
    def open(self) -> bool:
        """Whether it has not been closed."""
        return self._orders >= 0

    @property
    def lost(self) -> bool:
        """Whether the zygote's process has ended."""
        return self._process.poll() is not None

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        tell: Callable[[Message], None] = lambda message: None,
    ) -> Ended:
        """`call_at` here. Ctrl-C (or what else interrupts) stops the child, waits, and passes."""
        self.busy = True
        try:
            return call_at(
                self.address, function, request, tell, interrupted=self.stop, lost=lambda: self.lost
            )
        finally:
            self.busy = False

    def fork(self, function: str, request: Mapping[str, Any], **given: Any) -> Fork:
        """A child that begins to work; the options are those of `Fork`."""
        return Fork(self.address, function, request, lost=lambda: self.lost, **given)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send every child a signal, once; no further work is begun."""
        self.stopped = True
        self._order(f"{int(number)}")

    def kill(self, fork: Fork) -> None:
        """End a child and what it has started, now. One that was not begun never begins."""
        end = time.monotonic() + END_SECONDS
        fork.receive(0.0 if fork.pid is not None else PID_SECONDS)
        while fork.pid is not None and fork.ended is None:
            told = not self.lost and self._order(f"{int(signal.SIGKILL)} {fork.pid}")
            if not told or time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):  # nobody else does
                    os.killpg(fork.pid, signal.SIGKILL)
                break
            fork.receive(PID_SECONDS)
        if fork.pid is not None and fork.ended == Ended(None):  # nobody has ended its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(fork.pid, signal.SIGKILL)
        fork.close()

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """End the zygote; what still runs is stopped first, for which there are so many seconds."""
        if self._orders >= 0 and os.getpid() == self._owner:
            os.close(self._orders)
            self._orders = -1
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _order(self, line: str) -> bool:
        if self._orders < 0:
            return False
        try:
            os.write(self._orders, f"{line}\n".encode())
        except OSError:
            return False
        return True


def call_at(
    address: str,
    function: str,
    request: Mapping[str, Any],
    tell: Callable[[Message], None] = lambda message: None,
    *,
    interrupted: Callable[[], None] | None = None,
    lost: Callable[[], bool] = lambda: False,
) -> Ended:
    """Have a zygote's child do a call (see `Fork`); wait for its end.

    What it tells comes here as it is told. `interrupted` is called where this process is
    interrupted meanwhile, and the interruption raised again once the child has ended.
    """
    stop: BaseException | None = None
    try:
        begun = Fork(address, function, request, lost=lost)
    except ForkError as error:
        raise ForkError(
            f"{error} A sweep does without it by sweep.isolate=false, a trainer by "
            "call_in_subproc=False."
        ) from error
    with begun as fork:
        while fork.ended is None:
            try:
                messages = fork.receive()
            except (KeyboardInterrupt, SystemExit) as error:
                if interrupted is None:
                    raise
                if stop is None:
                    interrupted()
                stop = stop or error
                continue
            for told in messages:
                tell(told)
    if stop is not None:
        raise stop
    return fork.ended


def _parsed(line: bytes) -> Message | None:
    """What a line says; None for the rest of one that a killed child had begun."""
    try:
        found: Message = json.loads(line)
    except ValueError:
        return None
    return found


def _connected(address: str, lost: Callable[[], bool]) -> socket.socket:
    end = time.monotonic() + START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if lost() or not Path(address).parent.is_dir() or time.monotonic() > end:
                raise ForkError(
                    f"the process that starts the others does not answer ({error})."
                ) from error
            time.sleep(0.02)
            continue
        return connection
