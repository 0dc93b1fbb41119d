"""The slots of a worker in this process: which tasks they claim, when they end, and retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool_workers import wait_until

from qtorch.core.errors import TaskStoreError
from qtorch.task import TaskManager
from qtorch.task.stores.base import StoreUnavailable, retry_while_unavailable
from qtorch.task.worker import Slot, Supervisor, WorkerOptions


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'tasks.db'}"


class WorkerThread(threading.Thread):
    """A worker with two slots; `execute(definition)` runs its tasks instead of a child."""

    def __init__(self, manager: TaskManager, **options: Any) -> None:
        super().__init__(daemon=True)
        self.supervisor = Supervisor(
            WorkerOptions(manager.task_pool, manager.url, **options), ["cpu", "cpu"]
        )
        self.code: int | None = None

    def run(self) -> None:
        self.code = self.supervisor.run()

    def end(self) -> int | None:
        """Wait for the end of the worker and return its exit code; None if it does not end."""
        self.join(5.0)
        if self.is_alive():
            self.supervisor.control.is_draining = True
            self.supervisor.control.stop.set()
        return self.code


@pytest.fixture
def start_worker(manager, monkeypatch) -> Iterator[Callable[..., WorkerThread]]:
    workers = []

    def start(
        execute: Callable[[Any], Any] = lambda definition: definition["number"], **options: Any
    ) -> WorkerThread:
        monkeypatch.setattr(
            Slot,
            "_run_on_child",
            lambda slot, request, _: {"result": execute(request["definition"])},
        )
        workers.append(WorkerThread(manager, **options))
        workers[-1].start()
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


def test_max_tasks_counts_claimed_tasks_and_not_polls(manager, start_worker):
    """A slot polls the empty pool while the other one has no reservation; then a task comes."""
    worker = start_worker(max_tasks=1)
    threading.Event().wait(0.8)
    manager.create_task([{"number": 1}, {"number": 2}])
    assert worker.end() == 0
    assert manager.task_stat() == {"done": 1, "waiting": 1}


def test_no_slot_is_idle_while_another_one_has_a_task(manager, start_worker):
    go = threading.Event()
    manager.create_task([{"number": 1}])
    worker = start_worker(
        lambda definition: definition["number"] > 1 or go.wait(20), idle_timeout=0.2
    )
    threading.Event().wait(1.0)
    manager.create_task([{"number": 2}])
    wait_until(lambda: manager.task_stat() == {"running": 1, "done": 1}, 5.0)
    go.set()
    assert worker.end() == 0
    assert manager.task_stat() == {"done": 2}


def test_commit_is_repeated_while_the_store_is_unavailable(manager, start_worker, monkeypatch):
    monkeypatch.setattr("qtorch.task.worker.RETRY_SECONDS", 0.05)
    commit, failures = TaskManager.commit_task_res, [1, 2]

    def fail_twice_then_commit(manager, *arguments):
        def raise_unavailable():
            failures.pop()
            raise StoreUnavailable("connection refused")

        if failures:
            retry_while_unavailable(raise_unavailable, patience=0.0, action="commit")
        commit(manager, *arguments)

    monkeypatch.setattr(TaskManager, "commit_task_res", fail_twice_then_commit)
    manager.create_task([{"number": 1}])
    assert start_worker(idle_timeout=0).end() == 0
    assert manager.task_stat() == {"done": 1}


def test_store_that_rejects_the_commit_ends_the_worker(manager, start_worker, monkeypatch):
    """A retry would not help, so the worker does not try for ever."""

    def reject(*_):
        raise TaskStoreError("permission denied")

    monkeypatch.setattr(TaskManager, "commit_task_res", reject)
    manager.create_task([{"number": 1}])
    worker = start_worker(idle_timeout=0)
    assert worker.end() == 1
    assert "permission denied" in str([slot.error for slot in worker.supervisor.slots])
