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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qtorch.core.errors import QtorchError
from qtorch.process.child import Child, ExitStatus, Message, connect, run_child
from qtorch.process.stops import STOP_SIGNALS

POLL_SECONDS = 0.2
ORPHAN_SECONDS = 60.0  # for a child to write a checkpoint after its parent is gone
TRAINING_PRELOAD = "qtorch.trainer.preload"  # a module that imports what trainings need
# With the first variable torch counts GPUs without creating a CUDA context. The second keeps
# matplotlib from using a window or a notebook's backend.
FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "MPLBACKEND": "Agg"}
_start_lock = threading.Lock()  # the environment of this process changes during a start


class ForkError(QtorchError, RuntimeError):
    """A child could not be started, or was lost together with the fork server."""


class ForkServer(forkserver.ForkServer):
    """A fork server that imports `modules`; it is started by the first use, and again if killed.

    It ends when this process and all children have ended, or with `close`.
    """

    def __init__(self, *modules: str) -> None:
        super().__init__()
        self.set_forkserver_preload(list(modules))
        self.is_busy = False  # whether this process waits for a call

    def ensure_running(self) -> None:
        """Start the server if it does not run."""
        if self._is_running():
            return
        resource_tracker.ensure_running()  # it would unblock the signals below
        with _start_lock, _server_environment():
            # A signal in the middle of the imports, or of the start of a child, would do harm.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                super().ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _is_running(self) -> bool:
        pid = self._forkserver_pid  # type: ignore[attr-defined]
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
        path: Sequence[str] | None = None,
        output: Path | None = None,
        is_interruptible: bool = True,
        orphan_seconds: float = ORPHAN_SECONDS,
        silence_timeout: float | None = None,
    ) -> Child:
        """Call `function(request, parent)` in a child, without waiting for it.

        `function` is an import path, `request` is sent as JSON, `parent` is a
        `qtorch.process.child.Parent`, which explains the last three options. The child gets this
        process's working folder, `sys.argv`, `sys.path` (or `path`), `os.environ` (or
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
                status = self._request_child([child_end.fileno(), *outputs], path)
            except (OSError, EOFError) as error:
                own_end.close()
                raise ForkError(f"the fork server cannot start a process: {error}.") from error
        child = Child(own_end, status)
        child.send(
            {
                "function": function,
                "request": request,
                "environment": dict(os.environ if environment is None else environment),
                "is_interruptible": is_interruptible,
                "orphan_seconds": orphan_seconds,
                "silence_timeout": silence_timeout,
                "alive": time.monotonic(),
            }
        )
        return child

    def _request_child(self, descriptors: list[int], path: Sequence[str] | None) -> int:
        """Let the server start a child; return a pipe with its process ID and its exit code."""
        preparation = {
            "sys_path": list(sys.path if path is None else path),
            "sys_argv": sys.argv,
            "dir": os.getcwd(),
        }
        status, data = self.connect_to_new_process(descriptors)
        with open(data, "wb") as pipe:
            try:
                pipe.write(pickle.dumps(preparation) + pickle.dumps(_ChildMain()))
            except BaseException:
                os.close(status)
                raise
        return status

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
        then the interruption is raised again after the child has ended.
        """
        if is_stopped():
            return ExitStatus(None, is_refused=True)
        interruption: BaseException | None = None
        is_stop_sent = False
        self.is_busy = True
        try:
            with self._start_call(function, request) as child:
                while child.exit_status is None:
                    try:
                        for message in child.receive(POLL_SECONDS):
                            on_message(message)
                        should_stop = interruption is not None or is_stopped()
                    except (KeyboardInterrupt, SystemExit) as error:
                        interruption, should_stop = interruption or error, True
                    if should_stop and not is_stop_sent:
                        is_stop_sent = True
                        child.stop()
        finally:
            self.is_busy = False
        if interruption is not None:
            raise interruption
        return child.exit_status

    def _start_call(self, function: str, request: Mapping[str, Any]) -> Child:
        try:
            return self.start(function, request)
        except ForkError as error:
            raise ForkError(
                f"{error} To run without subprocesses, set sweep.isolate=false (sweeps) or "
                "call_in_subproc=False (trainers)."
            ) from error

    def close(self) -> None:
        """End the server; children continue. The next use starts another server."""
        with _start_lock:
            if self._forkserver_pid is not None:  # type: ignore[attr-defined]
                os.kill(self._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
                # At the end of this process, its temporary folder with the socket is gone already.
                with contextlib.suppress(FileNotFoundError):
                    self._stop()  # type: ignore[attr-defined]


class _ChildMain:
    """What the fork server runs in a child, as it runs a `multiprocessing.Process`."""

    def _bootstrap(self, parent_sentinel: int) -> int:
        os.close(parent_sentinel)
        connection, *outputs = forkserver.get_inherited_fds()  # type: ignore[misc]
        os.set_inheritable(connection, False)
        return run_child(Connection(connection), outputs)


@contextmanager
def _server_environment() -> Iterator[None]:
    """Change the environment for a new server: it imports what this process would import."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    changes = {**FORK_SAFE, "PYTHONPATH": path}
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
