"""Waiting for tasks that others work on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import TaskTimeout
from qtorch.core.wording import counted
from qtorch.task.definition import Task
from qtorch.task.query import FAILED

if TYPE_CHECKING:
    from qtorch.task.manager import TaskManager

log = logging.getLogger(__name__)

NAMED_AT_MOST = 10


class WaitResult(dict[str, int]):
    """How many tasks have which status; `failed` holds the failed tasks themselves."""

    def __init__(self, stat: Mapping[str, int], failed: Sequence[Task] = ()) -> None:
        super().__init__(stat)
        self.failed = list(failed)


def wait_for(
    manager: TaskManager,
    query: Mapping[str, Any] | None,
    *,
    timeout: float | None,
    poll: float,
    on_progress: Callable[[dict[str, int]], None] | None,
    finished: Sequence[str],
) -> WaitResult:
    """See `TaskManager.wait`."""
    end = None if timeout is None else time.monotonic() + timeout
    before: dict[str, int] | None = None
    while True:
        manager.take_back_expired()
        stat = manager.task_stat(query)
        left = sum(n for status, n in stat.items() if status not in finished)
        if before is None and left:
            log.info("waiting for tasks of pool %r: %s", manager.task_pool, stat)
        if stat != before and on_progress is not None:
            on_progress(dict(stat))
        before = stat
        if not left:
            return _result(manager, stat, query)
        if end is not None and time.monotonic() >= end:
            raise _timeout(manager, float(timeout or 0), query, finished)
        time.sleep(poll if end is None else max(0.0, min(poll, end - time.monotonic())))


def _result(
    manager: TaskManager, stat: Mapping[str, int], query: Mapping[str, Any] | None
) -> WaitResult:
    if not stat.get(FAILED):
        return WaitResult(stat)
    failed = [t for t in manager.query(query, decode=False) if t["status"] == FAILED]
    lines = "".join(f"\n  task {t['_id']}: {t['error']}" for t in failed)
    log.warning("%d of %d tasks failed:%s", len(failed), sum(stat.values()), lines)
    return WaitResult(stat, failed)


def _timeout(
    manager: TaskManager,
    timeout: float,
    query: Mapping[str, Any] | None,
    finished: Sequence[str],
) -> TaskTimeout:
    tasks = [t for t in manager.query(query, decode=False) if t["status"] not in finished]
    shown = [
        f"{t['_id']} ({t['status']}{' on ' + t['worker']['host'] if t['worker'] else ''})"
        for t in tasks[:NAMED_AT_MOST]
    ]
    more = f", and {len(tasks) - len(shown)} more" if len(tasks) > len(shown) else ""
    return TaskTimeout(
        f"after {timeout:g} s, {counted(len(tasks), 'unfinished task')} of pool "
        f"{manager.task_pool!r}: {', '.join(shown)}{more}. Start workers, or wait longer.",
        [t["_id"] for t in tasks],
    )
