"""The fork server: a process with its imports done, from which children start without delay.

It is the fork server of `multiprocessing`. Children share the memory pages of its imports; what
they use themselves, on the host or a GPU, is freed when they exit. Nothing creates a CUDA context
in the server, because a forked process could not use it.

`multiprocessing.Process` is not used, for two reasons with tests. It makes the child import the
caller's main script, and scripts without a main guard would start again
(`test_script_without_a_main_guard`). And it waits forever for a server that hangs
(`test_hanging_fork_server_is_replaced`). So `start` itself sends what the server expects: the
preparation data without the script, and an object with the method `_bootstrap`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qtorch.core.errors import QtorchError
from qtorch.core.runtime import change_environment
from qtorch.core.secrets import url_variables
from qtorch.process.child import REFUSED_CALL, Child, ExitStatus, Message, child_main, connect
from qtorch.process.stops import STOP_SIGNALS

POLL_SECONDS = 0.2
MAX_TEMPORARY_PATH = 70  # bytes
ORPHAN_SECONDS = 60.0  # for a child to write a checkpoint after its parent is gone
TRAINING_PRELOAD = "qtorch.trainer.preload"  # a module that imports what trainings need
# With the first variable torch counts GPUs without creating a CUDA context. The second keeps
# matplotlib from using a window or a notebook's backend.
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "MPLBACKEND": "Agg"}
# Held while a server starts, because the environment of this process changes meanwhile, and while
# a server is asked for a child, so that no other thread closes it in between.
_lock = threading.RLock()


class ForkError(QtorchError, RuntimeError):
    """A child could not be started, or was lost together with the fork server."""


class ForkServer(forkserver.ForkServer):
    """A fork server that imports `modules`; it is started by the first use, and again if killed.

    It ends when this process and all children have ended, or with `close`.
    """

    def __init__(self, *modules: str) -> None:
        super().__init__()
        self.set_forkserver_preload(["qtorch.process.server_memory", *modules])
        # Whether this process waits for a call: the signal handler of a sweep interrupts the main
        # thread only outside of calls, which see by themselves that the sweep is stopped.
        self.is_calling = False

    def ensure_running(self) -> None:
        """Start the server if it does not run."""
        with _lock:
            if self._is_running():
                return
            _choose_socket_folder()
            resource_tracker.ensure_running()  # it would unblock the signals below
            with _server_environment():
                # A signal in the middle of the imports, or of the start of a child, would do harm.
                previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                try:
                    super().ensure_running()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _is_running(self) -> bool:
        pid = self._forkserver_pid  # type: ignore[attr-defined]  # not in the stubs
        # A server that has ended stays a zombie, for `ensure_running` of the base class.
        return pid is not None and not os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        )

    def start(
        self,
        function: str,
        request: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        sys_path: Sequence[str] | None = None,
        output: Path | None = None,
        is_interruptible: bool = True,
        orphan_seconds: float = ORPHAN_SECONDS,
        silence_timeout: float | None = None,
    ) -> Child:
        """Call `function(request, parent)` in a child, without waiting for it.

        `function` is an import path, `request` is sent as JSON, `parent` is a
        `qtorch.process.child.Parent`, which explains the last three options. The child gets this
        process's working folder, `sys.argv`, `sys.path` (or `sys_path`), `os.environ` (or
        `environment`), and output (or the file `output`). Raises ForkError if that is impossible.
        """
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        own_end, child_end = connect()
        with child_end, contextlib.ExitStack() as stack:
            outputs = [1, 2]
            if output is not None:
                outputs = [stack.enter_context(output.open("ab")).fileno()] * 2
            try:
                child = self._request_child(own_end, [child_end.fileno(), *outputs], sys_path)
            except (OSError, EOFError) as error:
                own_end.close()
                raise ForkError(f"the fork server cannot start a process: {error}.") from error
        child.send(
            {
                "function": function,
                "request": request,
                "environment": {
                    **(current_environment() if environment is None else environment),
                    **url_variables(),
                },
                "is_interruptible": is_interruptible,
                "orphan_seconds": orphan_seconds,
                "silence_timeout": silence_timeout,
                "alive": time.monotonic(),
            }
        )
        return child

    def _request_child(
        self, own_end: Connection, descriptors: list[int], sys_path: Sequence[str] | None
    ) -> Child:
        """Let the server start a child that gets the descriptors."""
        preparation = {
            "sys_path": list(sys.path if sys_path is None else sys_path),
            "sys_argv": sys.argv,
            "dir": os.getcwd(),
        }
        with _lock:
            try:
                status_pipe, data = self._connect(descriptors)
            except ConnectionRefusedError:  # the server has just been killed
                status_pipe, data = self._connect(descriptors)
            server_pid: int = self._forkserver_pid  # type: ignore[attr-defined]  # not in the stubs
            # Also in the lock: a thread that closes the server before it has forked would close
            # the other end of the pipe.
            with open(data, "wb") as pipe:
                try:
                    pipe.write(pickle.dumps(preparation) + pickle.dumps(_ChildMain()))
                except BaseException:
                    os.close(status_pipe)
                    raise
        return Child(own_end, status_pipe, server_pid)

    def _connect(self, descriptors: list[int]) -> tuple[int, int]:
        try:
            return self.connect_to_new_process(descriptors)
        except OSError:
            self.close()  # whatever it was, the next use needs another server
            raise

    def call(
        self,
        function: str,
        request: Mapping[str, Any],
        on_message: Callable[[Message], None] = lambda message: None,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> ExitStatus:
        """Call a function in a child (see `start`) and wait for its end.

        The child is stopped when `is_stopped` returns True, and if this process is interrupted:
        then the interruption is raised again after the child has ended. A further Ctrl-C kills the
        child. `on_message` is called in another thread.
        """
        if is_stopped():
            return REFUSED_CALL
        self.is_calling = True
        try:
            with self._start_call(function, request) as child:
                return _Call(child, on_message, is_stopped).wait()
        finally:
            self.is_calling = False

    def _start_call(self, function: str, request: Mapping[str, Any]) -> Child:
        try:
            return self.start(function, request)
        except ForkError as error:
            raise ForkError(
                f"{error} To run without subprocesses, set sweep.isolate=false (sweeps) or "
                "call_in_subproc=False (trainers)."
            ) from error

    def close(self, pid: int | None = None) -> None:
        """End the server; children continue. The next use starts another server.

        With `pid` (`Child.server_pid`) nothing happens if another thread has replaced the server
        with this process ID already.
        """
        with _lock:
            server_pid: int | None = self._forkserver_pid  # type: ignore[attr-defined]  # not in the stubs
            if server_pid is not None and pid in (None, server_pid):
                os.kill(server_pid, signal.SIGKILL)
                # At the end of this process, its temporary folder with the socket is gone already.
                with contextlib.suppress(FileNotFoundError):
                    self._stop()  # type: ignore[attr-defined]  # not in the stubs


class _Call:
    """Waits for the end of a call's child, and receives its messages until then.

    Interruptions are raised in the main thread, where they could fall between reading a message and
    handling it. So another thread receives the messages, and loses none.
    """

    def __init__(
        self,
        child: Child,
        on_message: Callable[[Message], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._child, self._on_message, self._is_stopped = child, on_message, is_stopped
        self._interruptions: list[BaseException] = []
        self._error: BaseException | None = None
        self._receiver_lock = threading.Lock()  # held by the one thread that receives
        # Because an interrupted `Thread.join` of Python 3.11 takes a running thread for ended.
        self._has_ended = threading.Event()

    def wait(self) -> ExitStatus:
        """Return the exit status of the child; raise an interruption or an error afterwards."""
        while True:
            # Nothing stands outside of `try`: an interruption between two steps of a loop that did
            # would leave this method while messages are still to come.
            try:
                if not self._receiver_lock.locked():
                    threading.Thread(target=self._receive, daemon=True, name="call").start()
                self._has_ended.wait()
                break
            except (KeyboardInterrupt, SystemExit) as interruption:
                self._interruptions.append(interruption)
        if self._interruptions:
            raise self._interruptions[0]
        if self._error is not None:
            raise self._error
        assert self._child.exit_status is not None
        return self._child.exit_status

    def _receive(self) -> None:
        """Handle messages and pass on interruptions until the child has ended."""
        if not self._receiver_lock.acquire(blocking=False):
            return  # the start of the first thread was interrupted, but it runs
        try:
            is_stop_sent = False
            while self._child.exit_status is None:
                for message in self._child.receive(POLL_SECONDS):
                    self._on_message(message)
                if any(isinstance(i, KeyboardInterrupt) for i in self._interruptions[1:]):
                    self._child.kill()
                elif not is_stop_sent and (self._interruptions or self._is_stopped()):
                    is_stop_sent = True
                    self._child.stop()
        except BaseException as error:
            self._error = error
        finally:
            self._has_ended.set()


class _ChildMain:
    """What the fork server runs in a child, as it runs a `multiprocessing.Process`."""

    def _bootstrap(self, parent_sentinel: int) -> int:
        os.close(parent_sentinel)
        connection, *outputs = forkserver.get_inherited_fds()  # type: ignore[misc]  # in a child never None
        os.set_inheritable(connection, False)  # processes that the work starts must not hold it
        return child_main(Connection(connection), outputs)


def current_environment() -> dict[str, str]:
    """Return a copy of this process's environment, without what a starting server changes in it."""
    with _lock:
        return dict(os.environ)


def _choose_socket_folder() -> None:
    """Let multiprocessing create its folder of sockets in /tmp if the path of TMPDIR is too long.

    The path of a socket has at most 107 bytes, of which the folder and its name need about 30.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_TEMPORARY_PATH:
        return
    previous, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = previous


def _server_environment() -> AbstractContextManager[None]:
    """Change the environment for a new server: it imports what this process would import."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return change_environment({**FORK_SAFE, "PYTHONPATH": path})


_servers: dict[tuple[str, ...], ForkServer] = {}


def fork_server(*modules: str) -> ForkServer:
    """Return this process's fork server that imports `modules`."""
    return _servers.setdefault(modules, ForkServer(*modules))


def close_fork_servers() -> None:
    """End the fork servers of this process."""
    for server in _servers.values():
        server.close()


atexit.register(close_fork_servers)
os.register_at_fork(after_in_child=_servers.clear)  # they belong to the parent
