"""Real processes without import time: forked from the test process, and used like Popen."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util

import qtorch.trainer.preload  # noqa: F401  # so that no forked fork server has to import it
from qtorch.process import fork_server

start_program = util.spawnv_passfds


class ForkedProcess:
    """A forked process that calls `work` and exits with its return value (0 for None).

    `new_session`: as a daemon is started, so that signals of a terminal do not reach it.
    """

    def __init__(self, work: Callable[[], int | None], *, new_session: bool = False) -> None:
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if new_session:
                    os.setsid()
                code = work() or 0
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def fork_servers_in_place(prepare: Callable[[], None] = lambda: None) -> None:
    """Fork this process's fork servers from it; `prepare` is called in each of them.

    Replaces the function with which `multiprocessing` starts them, until `start_servers_as_usual`.
    """

    def start(path: bytes, arguments: Sequence[str | bytes], descriptors: Sequence[int]) -> int:
        code = os.fsdecode(arguments[-1])
        if "multiprocessing.forkserver" not in code:
            return start_program(path, arguments, descriptors)

        def serve() -> None:
            # An inherited end of a pipe or socket would hide the death of its owner. Its number
            # stays taken: inherited objects that close it later would close what has got it.
            null = os.open(os.devnull, os.O_RDWR)
            for number in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError):
                    mode = os.fstat(number).st_mode
                    is_channel = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
                    if is_channel and number > 2 and number not in descriptors:
                        os.dup2(null, number)
            fork_server._lock = threading.RLock()  # it is held by the thread that forks
            prepare()
            with suppress(SystemExit):
                exec(code, {})

        return ForkedProcess(serve).pid

    fork_server._servers = {}
    util.spawnv_passfds = start


def start_servers_as_usual() -> None:
    """Undo `fork_servers_in_place` and end the servers that it has started."""
    fork_server.close_fork_servers()
    fork_server._servers = {}
    util.spawnv_passfds = start_program
