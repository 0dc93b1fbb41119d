"""The SQLite file of a pool is deleted or replaced while processes use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from pool_workers import HERE, STARTED, wait_until

from qtorch.task import TaskManager, run_task
from qtorch.task.definition import encode_definition
from qtorch.task.stores import sql
from qtorch.task.stores.base import StoreFileLost

DELETED, REPLACED = "deleted", "replaced"


def lose(path, kind):
    """Delete the file of a pool, or put an equal copy in its place."""
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    if kind == DELETED:
        path.unlink()
    else:
        os.replace(copy, path)


@pytest.mark.parametrize("kind", [DELETED, REPLACED])
def test_every_call_is_refused_until_the_store_is_opened_again(tmp_path, kind):
    path = tmp_path / "tasks.db"
    manager = TaskManager("pool", f"sqlite:///{path}")
    manager.create_task([{"number": 1}, {"number": 2}])
    task = manager.fetch_task()
    lose(path, kind)
    calls = (
        manager.task_stat,
        manager.fetch_task,
        lambda: manager.create_task([{"number": 3}]),
        lambda: manager._pool._store().insert("pool", [encode_definition({"number": 3})]),
        lambda: manager.renew(task),
        lambda: manager.commit_task_res(task, 1),
        lambda: manager.wait(timeout=5),
    )
    for call in calls:
        with pytest.raises(StoreFileLost, match=rf"{path} of the task pool was {kind}"):
            call()
    assert path.exists() == (kind == REPLACED)
    manager.close()
    assert manager.task_stat() == ({"running": 1, "waiting": 1} if kind == REPLACED else {})
    manager.close()


def test_run_task_stops_the_work_when_the_file_is_lost(tmp_path):
    path, calls = tmp_path / "tasks.db", []
    TaskManager("pool", f"sqlite:///{path}").create_task([{"number": 1}, {"number": 2}])

    def work(definition):
        calls.append(definition["number"])
        lose(path, DELETED)
        wait_until(lambda: False)  # until it is interrupted

    with pytest.raises(StoreFileLost, match="was deleted"):
        run_task(work, "pool", url=f"sqlite:///{path}", lease=0.6)
    assert calls == [1]


def test_check_of_the_file_costs_microseconds(tmp_path, monkeypatch):
    manager = TaskManager("pool", f"sqlite:///{tmp_path}/tasks.db")
    manager.task_stat()
    calls = []
    monkeypatch.setattr(sql.os, "stat", lambda path: calls.append(path) or os.lstat(path))
    manager.task_stat()
    assert len(calls) == 1
    manager.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behavior", "kind"), [("quick", DELETED), ("quick", REPLACED), ("long", DELETED)]
)
def test_worker_stops_with_the_reason(tmp_path, behavior, kind):
    path, journal = tmp_path / "tasks.db", tmp_path / "journal"
    manager = TaskManager("pool", f"sqlite:///{path}")
    definition = {"behavior": behavior, "number": 1, "journal": str(journal), "go": "never"}
    manager.create_task([definition])
    words = ("pool=pool", f"url=sqlite:///{path}", "func=worker_parts.act", "lease=2")
    worker = subprocess.Popen(
        [sys.executable, "-m", "qtorch.cli.main", "worker", *words, "devices=cpu", "per_device=2"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    STARTED.append(worker)
    wait_until(journal.exists, 60)
    if behavior == "quick":
        wait_until(lambda: manager.task_stat() == {"done": 1})
    manager.close()
    lose(path, kind)
    out = worker.communicate(timeout=60)[0].decode()
    assert worker.returncode == 1, out
    assert f"error: the file {path} of the task pool was {kind} while it was open" in out
    assert path.exists() == (kind == REPLACED)
    if behavior == "long":
        child = int(journal.read_text().split()[1])
        wait_until(lambda: not os.path.exists(f"/proc/{child}"))
