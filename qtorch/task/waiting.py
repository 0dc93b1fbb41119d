"""Wait for tasks that other processes run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import TaskTimeout
from qtorch.core.wording import format_count
from qtorch.task.definition import Task
from qtorch.task.query import FAILED

if TYPE_CHECKING:
    from qtorch.task.manager import TaskManager

log = logging.getLogger(__name__)

MAX_LISTED = 10


class WaitResult(dict[str, int]):
    """The number of tasks per status; `failed_tasks` contains the failed tasks."""

    def __init__(self, stat: Mapping[str, int], failed_tasks: Sequence[Task] = ()) -> None:
        super().__init__(stat)
        self.failed_tasks = list(failed_tasks)


def wait_for_tasks(
    manager: TaskManager,
    query: Mapping[str, Any] | None,
    *,
    timeout: float | None,
    poll: float,
    on_progress: Callable[[dict[str, int]], None] | None,
    final_statuses: Sequence[str],
) -> WaitResult:
    """See `TaskManager.wait`."""
    end = None if timeout is None else time.monotonic() + timeout
    previous_stat: dict[str, int] | None = None
    while True:
        manager.reclaim_expired_leases()
        stat = manager.task_stat(query)
        num_unfinished = sum(n for status, n in stat.items() if status not in final_statuses)
        if previous_stat is None and num_unfinished:
            log.info("waiting for tasks of pool %r: %s", manager.task_pool, stat)
        if stat != previous_stat and on_progress is not None:
            on_progress(dict(stat))
        previous_stat = stat
        if not num_unfinished:
            return _build_result(manager, stat, query)
        if end is not None and time.monotonic() >= end:
            raise _build_timeout_error(manager, float(timeout or 0), query, final_statuses)
        time.sleep(poll if end is None else max(0.0, min(poll, end - time.monotonic())))


def _build_result(
    manager: TaskManager, stat: Mapping[str, int], query: Mapping[str, Any] | None
) -> WaitResult:
    if not stat.get(FAILED):
        return WaitResult(stat)
    failed_tasks = [t for t in manager.query(query, decode=False) if t["status"] == FAILED]
    lines = "".join(f"\n  task {t['_id']}: {t['error']}" for t in failed_tasks)
    log.warning("%d of %d tasks failed:%s", len(failed_tasks), sum(stat.values()), lines)
    return WaitResult(stat, failed_tasks)


def _build_timeout_error(
    manager: TaskManager,
    timeout: float,
    query: Mapping[str, Any] | None,
    final_statuses: Sequence[str],
) -> TaskTimeout:
    tasks = [t for t in manager.query(query, decode=False) if t["status"] not in final_statuses]
    descriptions = [
        f"{t['_id']} ({t['status']}{' on ' + t['worker']['host'] if t['worker'] else ''})"
        for t in tasks[:MAX_LISTED]
    ]
    suffix = (
        f", and {len(tasks) - len(descriptions)} more" if len(tasks) > len(descriptions) else ""
    )
    return TaskTimeout(
        f"timeout after {timeout:g} s: {format_count(len(tasks), 'unfinished task')} of pool "
        f"{manager.task_pool!r}: {', '.join(descriptions)}{suffix}. Start workers, or wait longer.",
        [t["_id"] for t in tasks],
    )
