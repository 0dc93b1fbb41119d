"""Claims and leases on top of a store, and rejection of changes by workers that lost a lease."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from qtorch.core.errors import LeaseLost, TaskDefinitionError
from qtorch.core.secrets import redact_urls
from qtorch.core.session import resolve_path, session
from qtorch.task.definition import Task
from qtorch.task.rows import row_to_task
from qtorch.task.stores.base import (
    FAILED,
    PART_DONE,
    RUNNING,
    WAITING,
    Change,
    Condition,
    Row,
    Store,
    open_store,
    retry_while_unavailable,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

URL_VARIABLE = "QTORCH_TASK_URL"
MAX_ERROR_CHARS, MAX_TRACEBACK_CHARS = 5000, 100_000
COUNTERS = ("errors", "lost", "preemptions")


def default_url() -> str:
    """Return the default URL of task pools: of `qtorch.init`, else QTORCH_TASK_URL, else SQLite.

    The SQLite file is `mlruns/tasks.db` in the working folder, beside the default tracking store.
    """
    url = session().task_url or os.environ.get(URL_VARIABLE)
    return url or f"sqlite:///{resolve_path('mlruns/tasks.db')}"


class Pool:
    """One pool of a store; TaskManager is built on it.

    The store is opened on first use, once in each process (a forked process opens its own).
    """

    def __init__(
        self, task_pool: str, url: str, *, lease: float, max_lost: int, patience: float
    ) -> None:
        self.task_pool = task_pool
        self.url = url
        self.lease = lease
        self.max_lost = max_lost
        self.patience = patience
        self._process_store: tuple[int, Store] | None = None
        self._parent_stores: list[Store] = []  # opened by the parent of this forked process
        self._last_reclaim = -math.inf  # when this process last searched expired leases
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        names = ("task_pool", "url", "lease", "max_lost", "patience")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Pool.__init__(self, **state)

    def call(self, action: str, operation: Callable[[Store], T]) -> T:
        """Run an operation of the store; retry it while the store is unavailable."""
        return retry_while_unavailable(
            lambda: operation(self._store()), patience=self.patience, action=action
        )

    def close(self) -> None:
        """Close the connections; the next use opens the store again."""
        with self._lock:
            if self._process_store is not None and self._process_store[0] == os.getpid():
                self._process_store[1].close()
            self._process_store = None

    def claim(self, condition: Condition, status: str, worker: str | None) -> Row | None:
        """Claim the first matching task for one lease."""
        claim_id, is_retry = secrets.token_hex(8), False
        host, pid = socket.gethostname(), os.getpid()
        worker_info = {"id": worker or f"{host}:{pid}", "host": host, "pid": pid}
        values = {"status": RUNNING, "origin": status, "claim": claim_id, "progress": None}
        change = Change({**values, "worker": json.dumps(worker_info)}, {"attempt": 1}, self.lease)

        def try_claim(store: Store) -> Row | None:
            nonlocal is_retry
            # An earlier try may have succeeded although its answer was lost.
            row = store.find_claim(self.task_pool, claim_id) if is_retry else None
            is_retry = True
            return row or store.claim(self.task_pool, status, condition, change)

        return self.call("fetch a task", try_claim)

    def reclaim_expired_leases(self, *, at_most_every: float = 0.0) -> int:
        """Return tasks with an expired lease to the pool; fail those that lost too many leases.

        Returns their number. Does nothing if the last call was less than `at_most_every` seconds
        ago.
        """
        now, count = time.monotonic(), 0
        if now - self._last_reclaim < at_most_every:
            return 0
        self._last_reclaim = now
        for row in self.call(
            "search expired leases", lambda s: s.find_expired_rows(self.task_pool)
        ):
            try:
                task = row_to_task(row, load_recorders=False)
            except TaskDefinitionError as error:
                count += self.fail_row(row, error)
                continue
            num_lost, worker_info = task["lost"] + 1, task["worker"] or {}
            text = (
                f"lost its lease on {worker_info.get('host')} (process {worker_info.get('pid')}), "
                f"{num_lost} in all"
            )
            is_failed = num_lost >= self.max_lost
            origin = row["origin"] if row["origin"] in (WAITING, PART_DONE) else WAITING
            values = {"status": FAILED if is_failed else origin, "error": text}
            if self._reclaim_task(row, Change(values, {"lost": 1})):
                count += 1
                log.warning("task %s %s%s", row["id"], text, ": failed" if is_failed else "")
        return count

    def fail_row(self, row: Row, error: Exception) -> int:
        """Mark a running task as failed whose row is invalid; return whether it was (0 or 1)."""
        log.error("task %s failed: %s", row["id"], error)
        condition = Condition(ids=(row["id"],), statuses=(RUNNING,))
        change = Change({"status": FAILED, **error_columns(error, None)}, {"errors": 1})
        return self.call("fail a task", lambda s: s.change_all(self.task_pool, condition, change))

    def _reclaim_task(self, row: Row, change: Change) -> bool:
        return self.call(
            "return a task with an expired lease",
            lambda s: s.change(row["id"], row["attempt"], change, only_if_expired=True),
        )

    def change_claimed_task(self, task: Task, change: Change, action: str) -> None:
        """Change a claimed task; raise LeaseLost if the caller no longer holds its lease.

        A change that ends the lease is accepted once more if the task already is in the state
        that it leads to: an earlier try has succeeded and only its answer was lost.
        """
        id, attempt = task["_id"], task["attempt"]
        ends_lease = "status" in change.values
        # From now on a renewal may be rejected without the lease being lost, see `LeaseRenewer`.
        task.is_settling = task.is_settling or ends_lease
        if self.call(action, lambda s: s.change(id, attempt, change)):
            return
        rows = self.call(action, lambda s: s.find(self.task_pool, Condition(ids=(id,))))
        if ends_lease and rows and _has_result_of(change, task, rows[0]):
            return
        raise LeaseLost(
            f"cannot {action}: attempt {attempt} of task {id} holds no lease any more "
            f"({_describe_state(rows)}); its result is discarded."
        )

    def release_task(self, task: Task, change: Change, action: str) -> bool:
        """Make a change that ends the lease; return False if the lease was lost before."""
        try:
            self.change_claimed_task(task, change, action)
        except LeaseLost as error:
            log.warning("%s", error)
            return False
        task["status"] = change.values["status"]
        return True

    def _store(self) -> Store:
        with self._lock:
            if self._process_store is not None and self._process_store[0] != os.getpid():
                # Closing it, also by garbage collection, would break the parent's connections.
                self._parent_stores.append(self._process_store[1])
                self._process_store = None
            if self._process_store is None:
                self._process_store = (os.getpid(), open_store(self.url))
            return self._process_store[1]


def error_columns(error: BaseException | str, traceback_text: str | None) -> dict[str, Any]:
    """Return the columns `error` and `traceback` of a row."""
    text = error
    if not isinstance(error, str):
        text = " ".join(f"{type(error).__name__}: {error}".split())
        traceback_text = traceback_text or "".join(traceback.format_exception(error))
    return {
        "error": _storable_text(redact_urls(str(text))[:MAX_ERROR_CHARS]),
        "traceback": traceback_text
        and _storable_text(redact_urls(traceback_text)[-MAX_TRACEBACK_CHARS:]),
    }


def _storable_text(text: str) -> str:
    """Return a text that every store accepts, without NUL and lone surrogates."""
    return text.replace("\0", "").encode(errors="backslashreplace").decode()


def _has_result_of(change: Change, task: Task, row: Row) -> bool:
    """Whether a row is in the state to which this change of the claimed task leads.

    The counters show who made it: if another process has reclaimed the task after its lease
    expired, the status may be the same, but a lost lease was counted instead of an error.
    """
    expected = {k: v for k, v in change.values.items() if k in ("status", "committed")}
    expected |= {k: task[k] + change.steps.get(k, 0) for k in COUNTERS}
    expected["attempt"] = task["attempt"]
    return all(row[name] == value for name, value in expected.items())


def _describe_state(rows: list[Row]) -> str:
    if not rows:
        return "the task was removed"
    return f"the task is {rows[0]['status']}, at attempt {rows[0]['attempt']}"
