"""The fork server: a process with its imports done, which forks one child for each call.

Started as `python -m qtorch.process.fork_server SOCKET COMMANDS MODULE ...`: the path of a socket
in a private folder, a file descriptor from which it reads the owner's commands (see
`ForkServer`), and the modules to import. For trainings, torch, Lightning and MLflow are
imported once, before any CUDA context exists; a child shares their memory pages and starts without
delay. The memory that a child uses, on the host or a GPU, is freed when it exits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qtorch.core.errors import QtorchError
from qtorch.core.names import locate
from qtorch.process.stops import SCHEDULER_SIGNALS, StopHandler

log = logging.getLogger(__name__)

FORK = "fork"  # key of messages about a child (pid, exit), as opposed to messages from it
GRACE_SECONDS = 60.0  # time to write a checkpoint after the caller or the owner is gone
MAX_DESCRIPTORS = 8  # file descriptors that a request may pass
ABANDONED = 97  # exit code if the owner exits before the imports are done


@dataclass
class Child:
    """A forked process: the connection to its caller, and the pipe for commands to it."""

    connection: socket.socket
    commands: int


class ForkServer:
    """Accepts requests, forks a child for each, and reports how each child ended.

    A command is a line. A signal number alone goes to every child, and no further child is
    started. A signal number and process ids go to those children only. SIGKILL is sent only by
    this process, because only the parent can be sure that a process id still belongs to the
    child. End of file on the commands means that the owner is gone: children are interrupted, or
    killed if they were already asked to stop.
    """

    def __init__(self, listener: socket.socket, commands: int) -> None:
        self._listener, self._commands = listener, commands
        self._children: dict[int, Child] = {}
        self._buffer = b""
        self._is_stopping = False
        self._deadline: float | None = None
        self._wakeup, wakeup_write = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(wakeup_write, False)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides what Ctrl-C does
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, lambda number, frame: self._stop(number))

    def serve(self) -> int:
        """Serve until the owner is gone and all children have exited."""
        with selectors.DefaultSelector() as selector:
            for source in (self._listener, self._commands, self._wakeup):
                selector.register(source, selectors.EVENT_READ)
            while self._children or self._commands >= 0:
                ready = [key.fileobj for key, _ in selector.select(1.0)]
                if self._wakeup in ready:
                    os.read(self._wakeup, 4096)
                self._reap()
                if self._commands in ready and not self._read_commands():
                    selector.unregister(self._commands)
                    self._commands = -1
                if self._listener in ready:
                    self._accept()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._signal_children(signal.SIGKILL)
        return 0

    def _accept(self) -> None:
        """Accept a request. Without free resources it waits, or only this request fails."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.error("fork server: cannot accept a request: %s", error)
            time.sleep(0.1)
            return
        try:
            self._fork(connection)
        except OSError as error:
            log.error("fork server: cannot start a process: %s", error)
            send_message(connection, {FORK: {"ended": 1}})
            connection.close()

    def is_orphaned(self) -> bool:
        """Whether the owner has exited (checked between the imports)."""
        ready = select.select([self._commands], [], [], 0)[0]
        return bool(ready) and not self._read_commands()

    def _read_commands(self) -> bool:
        """Execute the owner's commands; return False at end of file."""
        data = os.read(self._commands, 4096)
        if not data:
            self._signal_children(signal.SIGKILL if self._is_stopping else signal.SIGTERM)
            self._is_stopping, self._deadline = True, time.monotonic() + GRACE_SECONDS
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            number, *pids = map(int, line.split())
            if pids:
                self._signal_children(number, pids)
            else:
                self._stop(number)
        return True

    def _stop(self, number: int) -> None:
        self._is_stopping = True
        self._signal_children(number)

    def _signal_children(self, number: int, pids: Iterable[int] | None = None) -> None:
        for pid in self._children if pids is None else self._children.keys() & set(pids):
            if number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
                continue
            with contextlib.suppress(OSError):
                os.write(self._children[pid].commands, f"{number}\n".encode())

    def _reap(self) -> None:
        for pid in list(self._children):
            exited_pid, status = os.waitpid(pid, os.WNOHANG)
            if not exited_pid:
                continue
            child = self._children.pop(pid)
            with contextlib.suppress(ProcessLookupError):  # processes that the child left running
                os.killpg(pid, signal.SIGKILL)
            send_message(child.connection, {FORK: {"ended": os.waitstatus_to_exitcode(status)}})
            child.connection.close()
            os.close(child.commands)

    def _fork(self, connection: socket.socket) -> None:
        if self._is_stopping or _has_hung_up(connection):
            send_message(connection, {FORK: {"refused": True}})
            connection.close()
            return
        read_end, write_end = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(read_end)
            os.close(write_end)
            raise
        if pid:
            os.close(read_end)
            self._children[pid] = Child(connection, write_end)
            return
        code = 1
        try:
            # An own session: Ctrl-C in the terminal reaches only the owner, and the child's process
            # group can be killed as a whole.
            os.setsid()
            os.close(write_end)
            self._release_server_resources()
            code = _run_request(connection, read_end)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def _release_server_resources(self) -> None:
        """In the child: close what belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._listener.close()
        for descriptor in (self._commands, self._wakeup):
            if descriptor >= 0:
                os.close(descriptor)
        for sibling in self._children.values():
            sibling.connection.close()
            os.close(sibling.commands)


class Reply:
    """The second argument of a function that the fork server calls; sends messages to the caller.

    `reply(message)` sends a message. `stop_handler` handles the stop signals of this process, and
    `descriptors` are the file descriptors that the caller passed after standard output and error.
    """

    def __init__(
        self, connection: socket.socket, stop_handler: StopHandler, descriptors: Sequence[int]
    ) -> None:
        self._connection, self.stop_handler, self.descriptors = (
            connection,
            stop_handler,
            tuple(descriptors),
        )

    def __call__(self, message: Mapping[str, Any]) -> None:
        send_message(self._connection, message)

    def try_send(self, message: Mapping[str, Any]) -> None:
        """Send a message only if that does not block."""
        if _send_lock.acquire(timeout=0.1):
            try:
                with contextlib.suppress(OSError):
                    self._connection.send(_encode_line(message), socket.MSG_DONTWAIT)
            finally:
                _send_lock.release()


def _run_request(connection: socket.socket, commands: int) -> int:
    """In the child: read the request, set up environment, paths and folder, call the function."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, MAX_DESCRIPTORS)
    for standard in (1, 2):
        os.dup2(descriptors[standard - 1], standard)
        os.close(descriptors[standard - 1])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    send_message(connection, {FORK: {"pid": os.getpid()}})
    stop_handler = StopHandler()
    try:
        _start_command_thread(connection, commands, stop_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:], sys.argv[:] = request["path"], request["argv"]
        os.chdir(request["folder"])
        _set_threads()
        function = locate(request["function"])
    except KeyboardInterrupt:  # stopped before the work has begun
        send_message(connection, {FORK: {"refused": True}})
        return 0
    code = function(request["request"], Reply(connection, stop_handler, descriptors[2:]))
    return int(code or 0)


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the caller has closed the connection (a poll without events reports only that)."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _set_threads() -> None:
    """Apply the request's OMP_NUM_THREADS, which torch read when the server imported it."""
    num_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch = sys.modules.get("torch")
    if torch is not None and num_threads.isdigit() and int(num_threads):
        torch.set_num_threads(int(num_threads))


def _start_command_thread(
    connection: socket.socket, commands: int, stop_handler: StopHandler
) -> None:
    """Start a thread that executes commands, and stops the work if the caller or server is gone."""

    def read_commands() -> None:
        with selectors.DefaultSelector() as selector:
            for source in (connection, commands):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is connection:
                        with contextlib.suppress(OSError):
                            if connection.recv(4096):
                                continue
                        data = b""
                    else:
                        data = os.read(commands, 4096)
                    if not data:
                        _stop_abandoned_work(stop_handler)
                        return
                    for number in data.split():
                        stop_handler.interrupt(signal.Signals(int(number)))

    threading.Thread(target=read_commands, daemon=True, name="commands").start()


def _stop_abandoned_work(stop_handler: StopHandler) -> None:
    """Interrupt the work, and kill the process group if it does not end in time."""
    stop_handler.interrupt()
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


_send_lock = threading.Lock()


def send_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message as one line of JSON; lines of several threads do not mix."""
    line = _encode_line(message)
    if FORK in message:
        line = b"\n" + line  # a killed child may have written an incomplete line before
    with _send_lock, contextlib.suppress(OSError):  # the caller may be gone
        connection.sendall(line)


def _encode_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode() + b"\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def main(argv: list[str]) -> int:
    """Import the modules, then serve; delete the socket's folder, as a killed owner does not."""
    try:
        return _main(argv[0], int(argv[1]), argv[2:])
    finally:
        shutil.rmtree(Path(argv[0]).parent, ignore_errors=True)


def _main(path: str, commands: int, modules: Sequence[str]) -> int:
    with socket.socket(socket.AF_UNIX) as listener:
        partial = f"{path}.new"
        listener.bind(partial)
        listener.listen(128)
        listener.setblocking(False)
        os.rename(partial, path)  # from now on clients connect, and wait for the imports
        server = ForkServer(listener, commands)
        for name in modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # not installed, or not in this version of the library
                log.debug("fork server: cannot import %s: %s", name, error)
            if server.is_orphaned():
                return ABANDONED
        torch = sys.modules.get("torch")
        # A forked child cannot use CUDA if its parent has a CUDA context.
        assert torch is None or not torch.cuda.is_initialized()
        gc.collect()
        gc.freeze()  # garbage collection in the children then does not copy the shared pages
        _flush()  # else each child would print the buffered text again
        return server.serve()


START_SECONDS = 60.0  # until the server listens, which it does before its imports
PID_SECONDS = 1.0  # until a forked child reports its process id
CLOSE_SECONDS = GRACE_SECONDS + 15.0  # until all children and the server have exited
END_SECONDS = 5.0  # until the server has killed a child
SERVER_MODULE = "qtorch.process.fork_server"
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
    "qtorch.model.fit",
    "qtorch.data.handler.alpha",
    "qtorch.data.dataset.dataset",
    "qtorch.nn.recurrent",
    "qtorch.record.signal",
    "qtorch.record.signal",
    "qtorch.record.signal",
    "qtorch.record.report.signal_charts",
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
    `qtorch.process.fork_server.Reply`.
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
