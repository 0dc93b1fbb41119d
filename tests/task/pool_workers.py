"""Functions that the pool tests run in child processes, and helpers to start and await them."""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qtorch.task.run import current_task, run_task

HERE = Path(__file__).parent


def wait_until(condition: Callable[[], object], seconds: float = 20.0, pause: float = 0.02) -> None:
    """Wait until the condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout: the condition does not hold"
        time.sleep(pause)


STARTED: list[subprocess.Popen[bytes]] = []  # killed by a fixture after the test


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Python process that runs `code`; it can import this module."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    STARTED.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return STARTED[-1]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process (also a stopped one) and its children, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def append_line(path: str, line: str) -> None:
    """Append a line atomically, while other processes do so too."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def short_task(
    definition: Mapping[str, Any], journal: str, seconds: float = 0.02
) -> dict[str, Any]:
    """Write number and attempt to the journal and sleep; may raise or kill the worker."""
    task = current_task()
    assert task is not None
    append_line(journal, f"{definition['number']} {task['attempt']}")
    failure = definition.get("failure")
    if failure == "raise":
        raise ValueError("always")
    if failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(definition.get("seconds", seconds))
    return {"number": definition["number"], "attempt": task["attempt"]}


def run_worker(pool: str, url: str, journal: str, lease: float, seconds: float) -> None:
    """Run a worker until all tasks of the pool are finished."""
    run_task(
        short_task, pool, url=url, lease=lease, idle_timeout=None, journal=journal, seconds=seconds
    )


def run_worker_group(
    count: int, pool: str, url: str, journal: str, lease: float, seconds: float, kill_every: float
) -> None:
    """Run `count` workers, and kill one with SIGKILL every `kill_every` seconds (0: never).

    A worker that was killed (also by its own task) is replaced. The group ends when all workers
    have exited successfully.
    """
    import_module(
        f"qtorch.task.stores.{'mongo' if url.startswith('mongo') else 'sql'}"
    )  # import once, before the forks
    running: set[int] = set()

    def start_worker() -> None:
        pid = os.fork()
        if pid == 0:
            try:
                run_worker(pool, url, journal, lease, seconds)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        running.add(pid)

    for _ in range(count):
        start_worker()
    last = time.monotonic()
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            if os.WIFSIGNALED(status):
                start_worker()
            elif os.waitstatus_to_exitcode(status) != 0:
                sys.exit(f"a worker exited with status {status}")
        elif kill_every and time.monotonic() - last > kill_every:
            last = time.monotonic()
            os.kill(random.choice(sorted(running)), signal.SIGKILL)
        else:
            time.sleep(0.01)


def report_pid(definition: Mapping[str, Any], journal: str) -> dict[str, Any]:
    """A task that returns its process id, or kills its process."""
    if definition.get("failure") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    append_line(journal, str(os.getpid()))
    if definition.get("failure") == "hang":
        threading.Event().wait()
    return {"pid": os.getpid()}


def end_slowly(definition: Mapping[str, Any], journal: str) -> int:
    """A task whose process has work left at its exit."""

    def write_at_exit() -> None:
        time.sleep(1.0)
        append_line(journal, "exit")

    atexit.register(write_at_exit)
    return 1


def finish_in_spite_of_a_stop(definition: Mapping[str, Any], journal: str) -> int:
    """A task that ends its work early if it is stopped."""
    append_line(journal, "begin")
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        append_line(journal, "stop")
    return 7
