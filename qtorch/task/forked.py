"""The client of the fork server (`qtorch.task.zygote`): calls functions in forked processes.

The owner starts the server; other processes of the machine (the workers of a parallel launcher)
connect to its address and share it.
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

START_SECONDS = 60.0  # until the server listens, which it does before its imports
PID_SECONDS = 1.0  # until a forked child reports its process id
CLOSE_SECONDS = GRACE_SECONDS + 15.0  # until all children and the server have exited
END_SECONDS = 5.0  # until the server has killed a child
SERVER_MODULE = "qtorch.task.zygote"
# With the first variable torch counts GPUs without creating a CUDA context, which would not survive
# a fork. The second keeps matplotlib from using a window or a notebook's backend.
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "MPLBACKEND": "Agg"}
TRAINING_MODULES = (  # imported by every training
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
    "torch._dynamo",  # imported in an optimizer's first step
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
    """The fork server does not answer."""


@dataclass(frozen=True)
class ExitStatus:
    """How a child ended: its exit code, or minus the number of the signal that killed it.

    `code` is None if the server itself is gone. `is_refused`: the child was not started, because
    the server was stopping.
    """

    code: int | None
    is_refused: bool = False

    @property
    def description(self) -> str:
        """The end of a sentence, such as `was killed by SIGKILL` or `exited with code 1`."""
        if self.is_refused:
            return "was not started"
        if self.code is None:
            return "was lost together with the fork server"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


class ForkedCall:
    """A call of `function(request, reply)` in a child of the fork server, seen from the caller.

    `function` is an import path, `request` is sent as JSON, `reply` is a
    `qtorch.task.zygote.Reply`.
    The child gets this process's working folder, `sys.argv`, `sys.path` (or `path`), environment
    (with `environment` added), and `descriptors`: the first two become standard output and error.
    Raises ForkError if no server answers at `address`, without waiting if `is_server_gone`
    returns True.
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
        is_server_gone: Callable[[], bool] = lambda: False,
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
        self.pid: int | None = None  # set when the child reports it
        self.exit_status: ExitStatus | None = None
        self._buffer = b""
        self._connection = _connect(address, is_server_gone)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused: see `receive`
            socket.send_fds(self._connection, [b"+"], list(descriptors))
            self._connection.sendall(json.dumps(message, default=str).encode() + b"\n")

    def __enter__(self) -> ForkedCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, timeout: float | None = None) -> list[Message]:
        """Return the child's new messages; wait up to `timeout` seconds for one (None: forever).

        Sets `exit_status` when the child has ended.
        """
        if self.exit_status is not None:
            return []
        if timeout is not None and not select.select([self._connection], [], [], timeout)[0]:
            return []
        try:
            data = self._connection.recv(65536)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        messages = []
        for message in filter(None, map(_parse_line, lines)):
            if FORK in message:
                self._update_status(message[FORK])
            else:
                messages.append(message)
        if not data:
            self.exit_status = self.exit_status or ExitStatus(None)
        return messages

    def _update_status(self, message: Message) -> None:
        if "pid" in message:
            self.pid = message["pid"]
        elif self.exit_status is None:
            self.exit_status = ExitStatus(
                message.get("ended"), is_refused=message.get("refused", False)
            )

    def close(self) -> None:
        """Close the connection; a child that still works is stopped, with time for a checkpoint."""
        self._connection.close()


class ForkServerClient:
    """Starts and owns a fork server; the server ends with this process or with `close`.

    The server imports `modules` and ignores those that cannot be imported. Its own output goes to
    the file `output`, or to the output of this process.
    """

    def __init__(self, *modules: str, output: Path | None = None) -> None:
        self._folder = tempfile.mkdtemp(prefix="qtorch-")  # accessible to this user only
        self.address = os.path.join(self._folder, "fork_server")
        self.is_stopped = False
        self.is_busy = False  # whether this process waits for a call
        commands, self._commands = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, commands)
            file = None if output is None else stack.enter_context(output.open("ab"))
            self._process = self._start_process(
                [self.address, str(commands), *modules], commands, file
            )
        self._owner = os.getpid()

    def _start_process(
        self, arguments: Sequence[str], commands: int, output: IO[bytes] | None
    ) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)  # same imports as here
        return subprocess.Popen(
            [sys.executable, "-m", SERVER_MODULE, *arguments],
            env={**os.environ, **FORK_SAFE, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(commands,),
            start_new_session=True,  # Ctrl-C in the terminal reaches only this process
        )

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return self._commands >= 0

    @property
    def has_exited(self) -> bool:
        """Whether the server's process has exited."""
        return self._process.poll() is not None

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        on_message: Callable[[Message], None] = lambda message: None,
    ) -> ExitStatus:
        """Call a function in a child and wait for its end (see `call_fork_server`).

        If this process is interrupted (Ctrl-C), the child is stopped and waited for first.
        """
        self.is_busy = True
        try:
            return call_fork_server(
                self.address,
                function,
                request,
                on_message,
                on_interrupt=self.stop,
                is_server_gone=lambda: self.has_exited,
            )
        finally:
            self.is_busy = False

    def fork(self, function: str, request: Mapping[str, Any], **options: Any) -> ForkedCall:
        """Start a call without waiting for it; the options are those of `ForkedCall`."""
        return ForkedCall(
            self.address, function, request, is_server_gone=lambda: self.has_exited, **options
        )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to every child; the server starts no further children."""
        self.is_stopped = True
        self._send_command(f"{int(number)}")

    def kill(self, call: ForkedCall) -> None:
        """Kill a child and the processes that it has started; one not yet started never starts."""
        end = time.monotonic() + END_SECONDS
        call.receive(0.0 if call.pid is not None else PID_SECONDS)
        while call.pid is not None and call.exit_status is None:
            is_sent = not self.has_exited and self._send_command(
                f"{int(signal.SIGKILL)} {call.pid}"
            )
            if not is_sent or time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):  # the server cannot do it
                    os.killpg(call.pid, signal.SIGKILL)
                break
            call.receive(PID_SECONDS)
        # If the server was lost, it has not killed the child's process group.
        if call.pid is not None and call.exit_status == ExitStatus(None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(call.pid, signal.SIGKILL)
        call.close()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Stop the running children and the server; kill the server after `timeout` seconds."""
        if self._commands >= 0 and os.getpid() == self._owner:
            os.close(self._commands)
            self._commands = -1
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send_command(self, line: str) -> bool:
        if self._commands < 0:
            return False
        try:
            os.write(self._commands, f"{line}\n".encode())
        except OSError:
            return False
        return True


def call_fork_server(
    address: str,
    function: str,
    request: Mapping[str, Any],
    on_message: Callable[[Message], None] = lambda message: None,
    *,
    on_interrupt: Callable[[], None] | None = None,
    is_server_gone: Callable[[], bool] = lambda: False,
) -> ExitStatus:
    """Call a function in a child of a fork server (see `ForkedCall`) and wait for its end.

    `on_message` gets the child's messages as they arrive. If this process is interrupted
    meanwhile, `on_interrupt` is called and the interruption raised again after the child has ended.
    """
    stop: BaseException | None = None
    try:
        forked_call = ForkedCall(address, function, request, is_server_gone=is_server_gone)
    except ForkError as error:
        raise ForkError(
            f"{error} To run without subprocesses, set sweep.isolate=false (sweeps) or "
            "call_in_subproc=False (trainers)."
        ) from error
    with forked_call as call:
        while call.exit_status is None:
            try:
                messages = call.receive()
            except (KeyboardInterrupt, SystemExit) as error:
                if on_interrupt is None:
                    raise
                if stop is None:
                    on_interrupt()
                stop = stop or error
                continue
            for message in messages:
                on_message(message)
    if stop is not None:
        raise stop
    return call.exit_status


def _parse_line(line: bytes) -> Message | None:
    """Parse a message; return None for an incomplete line of a killed child."""
    try:
        message: Message = json.loads(line)
    except ValueError:
        return None
    return message


def _connect(address: str, is_server_gone: Callable[[], bool]) -> socket.socket:
    end = time.monotonic() + START_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if is_server_gone() or not Path(address).parent.is_dir() or time.monotonic() > end:
                raise ForkError(f"the fork server does not answer ({error}).") from error
            time.sleep(0.02)
            continue
        return connection
