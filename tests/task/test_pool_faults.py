"""Workers that are killed, are paused, or lose their store: real processes on every store."""

from __future__ import annotations

import collections
import os
import signal
import time
from pathlib import Path

import pytest
from local_servers import postgres
from pool_workers import kill, start, wait_until

from qtorch.task import TaskManager

WORKER_GROUP = """
import sys, pool_workers
count, pool, url, journal, lease, seconds, kill_every = sys.argv[1:]
pool_workers.run_worker_group(
    int(count), pool, url, journal, float(lease), float(seconds), float(kill_every)
)
"""
WORKER = """
import sys, pool_workers
pool, url, journal, lease, seconds = sys.argv[1:]
pool_workers.run_worker(pool, url, journal, float(lease), float(seconds))
"""


def create_tasks(manager: TaskManager, count: int, **fields) -> list[str]:
    return manager.create_task([{"number": k, **fields} for k in range(count)])


def start_workers(manager, journal, *, count, lease, seconds, kill_every=0.0):
    arguments = (count, manager.task_pool, manager.url, journal, lease, seconds, kill_every)
    return start(WORKER_GROUP, *map(str, arguments))


def check_attempts(manager: TaskManager, journal: Path) -> dict[str, int]:
    """Check that every task ran once, and once more per lost lease and error; return the counts."""
    lines = journal.read_text().splitlines()
    assert len(lines) == len(set(lines)), "an attempt ran twice"
    runs = collections.Counter(int(line.split()[0]) for line in lines)
    tasks = list(manager.query())
    assert not [t for t in tasks if t["status"] not in ("done", "failed")]
    for task in tasks:
        number = task["def"]["number"]
        limit = (1 if task["status"] == "done" else 0) + task["lost"] + task["errors"]
        assert runs[number] <= limit, f"{number}: {runs[number]} runs, at most {limit} expected"
        if task["status"] == "done":
            assert task["res"] == {"number": number, "attempt": task["attempt"]}
    return manager.task_stat()


@pytest.mark.slow
def test_every_task_is_done_once_while_workers_are_killed(manager, tmp_path):
    """Hundreds of tasks on eight workers, of which one is killed every half second."""
    num_tasks = 150 if manager.url.startswith("mongodb") else 400  # the test server is slow
    create_tasks(manager, num_tasks)
    workers = start_workers(
        manager, tmp_path / "journal", count=8, lease=2.0, seconds=0.15, kill_every=0.5
    )
    assert workers.wait(540) == 0
    assert check_attempts(manager, tmp_path / "journal") == {"done": num_tasks}
    min_lost = 2 if manager.url.startswith("mongodb") else 5
    num_lost = sum(t["lost"] for t in manager.query())
    assert num_lost >= min_lost, "too few workers were killed during a task"


@pytest.mark.slow
def test_tasks_that_kill_their_worker_or_raise_fail_in_the_end(manager, tmp_path):
    """Lost leases and errors are counted separately; the other tasks are done."""
    create_tasks(manager, 20)
    manager.create_task([{"number": 100, "failure": "kill"}, {"number": 101, "failure": "raise"}])
    workers = start_workers(manager, tmp_path / "journal", count=3, lease=0.5, seconds=0.01)
    assert workers.wait(120) == 0
    assert check_attempts(manager, tmp_path / "journal") == {"done": 20, "failed": 2}
    killer, raiser = manager.query({"number": {"$in": [100, 101]}})
    assert (killer["lost"], killer["errors"], killer["attempt"]) == (20, 0, 20)
    assert "lost its lease" in killer["error"]
    assert (raiser["lost"], raiser["errors"], raiser["attempt"]) == (0, 3, 3)
    assert raiser["error"] == "ValueError: always"
    assert "in short_task" in raiser["traceback"]


@pytest.mark.slow
def test_worker_killed_before_the_commit_loses_its_task(manager, tmp_path):
    journal = tmp_path / "journal"
    create_tasks(manager, 1)
    code = """
import os, signal
from qtorch.task import TaskManager
TaskManager.commit_task_res = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = (manager.task_pool, manager.url, str(journal), "0.6", "0")
    assert start(code + WORKER, *arguments).wait(30) == -signal.SIGKILL
    assert manager.task_stat() == {"running": 1}
    assert start(WORKER, *arguments).wait(30) == 0
    assert check_attempts(manager, journal) == {"done": 1}
    assert journal.read_text() == "0 1\n0 2\n"


@pytest.mark.slow
def test_commit_of_a_worker_paused_beyond_its_lease_is_rejected(manager, tmp_path):
    """After SIGCONT the worker finishes its task, but another one has done it already."""
    journal = tmp_path / "journal"
    create_tasks(manager, 1)
    arguments = (manager.task_pool, manager.url, str(journal), "0.7", "0.6")
    first = start(WORKER, *arguments)
    try:
        wait_until(lambda: journal.exists() and journal.read_text())
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.9)
        assert start(WORKER, *arguments).wait(30) == 0
        assert manager.task_stat() == {"done": 1}
        first.send_signal(signal.SIGCONT)
        assert first.wait(30) == 0
    finally:
        kill(first)
    assert check_attempts(manager, journal) == {"done": 1}
    (task,) = manager.query()
    assert (task["res"]["attempt"], task["lost"]) == (2, 1)


@pytest.mark.slow
def test_concurrent_create_task_creates_each_task_once(manager):
    code = """
import sys
from qtorch.task import TaskManager
manager = TaskManager(*sys.argv[1:3])
order = range(200) if sys.argv[3] == "0" else reversed(range(200))
for number in order:
    manager.create_task([{"number": number}, {"number": (number * 7) % 200}])
"""
    processes = [start(code, manager.task_pool, manager.url, str(k)) for k in range(4)]
    assert [p.wait(240) for p in processes] == [0] * 4
    numbers = sorted(t["def"]["number"] for t in manager.query())
    assert numbers == list(range(200))


@pytest.mark.slow
def test_workers_survive_restarts_of_postgres(tmp_path):
    """A fast and an immediate shutdown: running tasks continue, and none runs twice."""
    with postgres() as server:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        manager = TaskManager("restarted", url)
        create_tasks(manager, 120)
        workers = start_workers(manager, tmp_path / "journal", count=4, lease=60.0, seconds=0.15)
        wait_until(lambda: manager.task_stat().get("done", 0) > 10, 60.0)
        for shutdown_signal in (signal.SIGINT, signal.SIGQUIT):  # fast and immediate shutdown
            os.kill(server.get_pid(), shutdown_signal)
            time.sleep(1.0)
            server.start()
            num_done = manager.task_stat().get("done", 0)
            wait_until(lambda: manager.task_stat().get("done", 0) > min(num_done + 10, 119), 60.0)  # noqa: B023
        assert workers.wait(240) == 0
        assert check_attempts(manager, tmp_path / "journal") == {"done": 120}
        assert sum(t["lost"] for t in manager.query()) == 0
        manager.close()
