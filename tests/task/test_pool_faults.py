"""Workers that die, stop, and lose their store: real processes, each store."""

from __future__ import annotations

import collections
import os
import signal
import time
from pathlib import Path

import pytest
from pool_workers import end, postgres, start, until

from qtorch.task import TaskManager

NURSERY = """
import sys, pool_workers
count, pool, url, journal, lease, seconds, murder = sys.argv[1:]
pool_workers.nursery(int(count), pool, url, journal, float(lease), float(seconds), float(murder))
"""
WORKER = """
import sys, pool_workers
pool, url, journal, lease, seconds = sys.argv[1:]
pool_workers.work(pool, url, journal, float(lease), float(seconds))
"""


def raised(manager: TaskManager, count: int, **more) -> list[str]:
    return manager.create_task([{"number": k, **more} for k in range(count)])


def nurse(manager, journal, *, count, lease, seconds, murder=0.0):
    given = (count, manager.task_pool, manager.url, journal, lease, seconds, murder)
    return start(NURSERY, *map(str, given))


def check(manager: TaskManager, journal: Path) -> dict[str, int]:
    """Every finished task was run once, and once more for each lease that it lost."""
    lines = journal.read_text().splitlines()
    assert len(lines) == len(set(lines)), "an attempt was made twice"
    runs = collections.Counter(int(line.split()[0]) for line in lines)
    tasks = list(manager.query())
    assert not [t for t in tasks if t["status"] not in ("done", "failed")]
    for task in tasks:
        number = task["def"]["number"]
        limit = (1 if task["status"] == "done" else 0) + task["lost"] + task["errors"]
        assert runs[number] <= limit, f"{number}: {runs[number]} runs, {limit} allowed"
        if task["status"] == "done":
            assert task["res"] == {"number": number, "attempt": task["attempt"]}
    return manager.task_stat()


@pytest.mark.slow
def test_eight_workers_and_a_murderer(manager, tmp_path):
    """Hundreds of tasks, a worker killed with -9 every half second: each done once, none left."""
    tasks = 150 if manager.url.startswith("mongodb") else 400  # the server for tests is slow
    raised(manager, tasks)
    workers = nurse(manager, tmp_path / "journal", count=8, lease=2.0, seconds=0.15, murder=0.5)
    assert workers.wait(540) == 0
    assert check(manager, tmp_path / "journal") == {"done": tasks}
    assert sum(t["lost"] for t in manager.query()) >= 5, "the murderer did not hit anybody"


@pytest.mark.slow
def test_a_task_that_kills_and_a_task_that_raises(manager, tmp_path):
    """Both end as failed, each by its own count, and the others are done."""
    raised(manager, 20)
    manager.create_task([{"number": 100, "what": "kill"}, {"number": 101, "what": "raise"}])
    workers = nurse(manager, tmp_path / "journal", count=3, lease=0.5, seconds=0.01)
    assert workers.wait(120) == 0
    assert check(manager, tmp_path / "journal") == {"done": 20, "failed": 2}
    killer, raiser = manager.query({"number": {"$in": [100, 101]}})
    assert (killer["lost"], killer["errors"], killer["attempt"]) == (20, 0, 20)
    assert "lost its lease" in killer["error"]
    assert (raiser["lost"], raiser["errors"], raiser["attempt"]) == (0, 3, 3)
    assert raiser["error"] == "ValueError: always"
    assert "in brief" in raiser["traceback"]


@pytest.mark.slow
def test_killed_between_the_work_and_the_commit(manager, tmp_path):
    journal = tmp_path / "journal"
    raised(manager, 1)
    code = """
import os, signal
from qtorch.task import TaskManager
TaskManager.commit_task_res = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
"""
    arguments = (manager.task_pool, manager.url, str(journal), "0.6", "0")
    assert start(code + WORKER, *arguments).wait(30) == -signal.SIGKILL
    assert manager.task_stat() == {"running": 1}
    assert start(WORKER, *arguments).wait(30) == 0
    assert check(manager, journal) == {"done": 1}
    assert journal.read_text() == "0 1\n0 2\n"


@pytest.mark.slow
def test_a_worker_that_was_stopped_past_its_lease(manager, tmp_path):
    """Continued, it finishes what it was at, and its commit is refused."""
    journal = tmp_path / "journal"
    raised(manager, 1)
    arguments = (manager.task_pool, manager.url, str(journal), "0.7", "0.6")
    first = start(WORKER, *arguments)
    try:
        until(lambda: journal.exists() and journal.read_text())
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.9)
        assert start(WORKER, *arguments).wait(30) == 0
        assert manager.task_stat() == {"done": 1}
        first.send_signal(signal.SIGCONT)
        assert first.wait(30) == 0
    finally:
        end(first)
    assert check(manager, journal) == {"done": 1}
    (task,) = manager.query()
    assert (task["res"]["attempt"], task["lost"]) == (2, 1)


@pytest.mark.slow
def test_two_storms_at_once(manager):
    code = """
import sys
from qtorch.task import TaskManager
manager = TaskManager(*sys.argv[1:3])
order = range(200) if sys.argv[3] == "0" else reversed(range(200))
for number in order:
    manager.create_task([{"number": number}, {"number": (number * 7) % 200}])
"""
    storms = [start(code, manager.task_pool, manager.url, str(k)) for k in range(4)]
    assert [s.wait(240) for s in storms] == [0] * 4
    numbers = sorted(t["def"]["number"] for t in manager.query())
    assert numbers == list(range(200))


@pytest.mark.slow
def test_postgres_is_restarted_under_load(tmp_path):
    """Twice, once without any courtesy: work in hand goes on, nothing is done twice."""
    with postgres() as server:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        manager = TaskManager("restarted", url)
        raised(manager, 120)
        workers = nurse(manager, tmp_path / "journal", count=4, lease=60.0, seconds=0.15)
        until(lambda: manager.task_stat().get("done", 0) > 10, 60.0)
        for how in (signal.SIGINT, signal.SIGQUIT):  # fast, immediate
            os.kill(server.get_pid(), how)
            time.sleep(1.0)
            server.start()
            done = manager.task_stat().get("done", 0)
            until(lambda: manager.task_stat().get("done", 0) > min(done + 10, 119), 60.0)  # noqa: B023
        assert workers.wait(240) == 0
        assert check(manager, tmp_path / "journal") == {"done": 120}
        assert sum(t["lost"] for t in manager.query()) == 0
        manager.close()
