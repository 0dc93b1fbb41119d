"""The fork server: a process with its imports done, which forks one child for each call.

Started as `python -m qtorch.task.zygote SOCKET COMMANDS MODULE ...`: the path of a socket in a
private folder, a file descriptor from which it reads the owner's commands (see
`qtorch.task.forked`), and the modules to import. For trainings, torch, Lightning and MLflow are
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
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtorch.core.names import locate
from qtorch.core.stops import SCHEDULER_SIGNALS, StopHandler

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
