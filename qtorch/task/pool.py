"""Leases and fences on top of a store: what every change of a claimed task goes through."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
import traceback as tracebacks
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qtorch.core.errors import LeaseLost, TaskDefinitionError, TaskStoreError
from qtorch.core.session import session
from qtorch.task.definition import Task, decode_definition, decode_result
from qtorch.task.query import FAILED, RUNNING, WAITING, Condition
from qtorch.task.store import Change, Row, Store, retrying

log = logging.getLogger(__name__)

T = TypeVar("T")

URL_VARIABLE = "QTORCH_TASK_URL"
ERROR_LETTERS, TRACEBACK_LETTERS = 5000, 100_000
JSON_COLUMNS = ("worker", "run", "progress")
PLAIN_COLUMNS = ("status", "priority", "attempt", "errors", "lost", "preemptions", "deadline",
                 "created", "updated", "error", "traceback")  # fmt: skip


def default_url() -> str:
    """The URL of the pools in force: `qtorch.init`'s, else QTORCH_TASK_URL, else a sqlite file.

    That file is `mlruns/tasks.db` under the working folder, beside the default tracking store.
    """
    given = session().task_url or os.environ.get(URL_VARIABLE)
    return given or f"sqlite:///{Path('mlruns', 'tasks.db').absolute()}"


def open_store(url: str) -> Store:
    """The store behind a URL: sqlite:///FILE, postgresql://..., mongodb://..."""
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme in ("sqlite", "postgresql", "postgres"):
        from qtorch.task.sql import SqlStore

        return SqlStore(url)
    if scheme == "mongodb":
        from qtorch.task.mongo import MongoStore

        return MongoStore(url)
    raise TaskStoreError(
        f"the task URL {url!r} names no store that pools know. Write sqlite:///FILE, "
        "postgresql+psycopg://USER@HOST/DATABASE or mongodb://HOST/DATABASE."
    )


class Pool:
    """One pool of a store; the lower half of TaskManager.

    The store is opened at the first use, once in each process (a fork opens its own).
    """

    def __init__(
        self, task_pool: str, url: str, *, lease: float, max_lost: int, patience: float
    ) -> None:
        self.task_pool = task_pool
        self.url = url
        self.lease = lease
        self.max_lost = max_lost
        self.patience = patience
        self._opened: tuple[int, Store] | None = None
        self._inherited: list[Store] = []  # of the process that this one was forked from
        self._swept = -math.inf  # when expired leases were last looked for
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_opened", "_inherited", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened=None, _inherited=[], _lock=threading.Lock())

    def call(self, what: str, step: Callable[[Store], T]) -> T:
        """One step of the store, tried again while it is away."""
        return retrying(lambda: step(self._store()), patience=self.patience, what=what)

    def close(self) -> None:
        """Give the connections back; the next use opens the store again."""
        with self._lock:
            if self._opened is not None and self._opened[0] == os.getpid():
                self._opened[1].close()
            self._opened = None

    def claim(self, condition: Condition, status: str, worker: str | None) -> Row | None:
        """Take the first task that matches, for one lease."""
        mark, sent = secrets.token_hex(8), False
        host, pid = socket.gethostname(), os.getpid()
        who = {"id": worker or f"{host}:{pid}", "host": host, "pid": pid}
        values = {"status": RUNNING, "origin": status, "claim": mark, "progress": None}
        change = Change({**values, "worker": json.dumps(who)}, {"attempt": 1}, self.lease)

        def claim(store: Store) -> Row | None:
            nonlocal sent
            # The answer to an earlier try may have been lost on its way.
            row = store.claimed(self.task_pool, mark) if sent else None
            sent = True
            return row or store.claim(self.task_pool, status, condition, change)

        return self.call("fetch a task", claim)

    def take_back_expired(self, *, at_most_every: float = 0.0) -> int:
        """Let tasks whose lease has run out wait again; fail those that lost too many.

        How many there were. `at_most_every` so many seconds the store is asked.
        """
        now, count = time.monotonic(), 0
        if now - self._swept < at_most_every:
            return 0
        self._swept = now
        for row in self.call("look for lost leases", lambda s: s.expired(self.task_pool)):
            lost = int(row["lost"]) + 1
            who = json.loads(row["worker"] or "{}")
            text = f"lost its lease on {who.get('host')} (process {who.get('pid')}), {lost} in all"
            over = lost >= self.max_lost
            values = {"status": FAILED if over else row["origin"] or WAITING, "error": text}
            if self._take_back(row, Change(values, {"lost": 1})):
                count += 1
                log.warning("task %s %s%s", row["id"], text, ": failed" if over else "")
        return count

    def _take_back(self, row: Row, change: Change) -> bool:
        return self.call(
            "take back a task",
            lambda s: s.change(row["id"], row["attempt"], change, expired=True),
        )

    def change_mine(self, task: Task, change: Change, what: str) -> None:
        """A change that only the holder of the lease may make; LeaseLost for anybody else.

        A change of status that stands already is this one, sent before: its answer was lost.
        """
        id, attempt = task["_id"], task["attempt"]
        stands = {k: v for k, v in change.values.items() if k in ("status", "committed")}
        task.settling = task.settling or bool(stands)
        if self.call(what, lambda s: s.change(id, attempt, change)):
            return
        rows = self.call(what, lambda s: s.find(self.task_pool, Condition(ids=(id,))))
        for row in rows:
            same = row["attempt"] == attempt and all(row[k] == v for k, v in stands.items())
            if stands and same:
                return
        raise LeaseLost(
            f"task {id}: attempt {attempt} holds no lease any more ({_state(rows)}); to {what} is "
            "refused, and what it made is not kept."
        )

    def give_back(self, task: Task, change: Change) -> bool:
        """A change that ends the lease; False where it was lost before."""
        try:
            self.change_mine(task, change, "return the task")
        except LeaseLost as error:
            log.warning("%s", error)
            return False
        task["status"] = change.values["status"]
        return True

    def _store(self) -> Store:
        with self._lock:
            if self._opened is not None and self._opened[0] != os.getpid():
                self._inherited.append(self._opened[1])  # closing it would end the parent's
                self._opened = None
            if self._opened is None:
                self._opened = (os.getpid(), open_store(self.url))
            return self._opened[1]


def task_of(row: Row, *, live: bool, strict: bool = True) -> Task:
    """A row as a Task; with `live` runs in its result are Recorders.

    A definition that cannot be read raises TaskDefinitionError if `strict`, else stands as text.
    """
    task = Task(_id=row["id"])
    try:
        task["def"] = decode_definition(row["definition"])
    except TaskDefinitionError:
        if strict:
            raise
        task["def"] = row["definition"]
    task["res"] = decode_result(row["res"], live=live)
    task.update({k: row[k] for k in PLAIN_COLUMNS})
    task.update({k: json.loads(row[k]) if row[k] else None for k in JSON_COLUMNS})
    return task


def told(error: BaseException | str, traceback: str | None) -> dict[str, Any]:
    """An error as a row keeps it."""
    text = error
    if not isinstance(error, str):
        text = " ".join(f"{type(error).__name__}: {error}".split())
        traceback = traceback or "".join(tracebacks.format_exception(error))
    return {
        "error": str(text)[:ERROR_LETTERS],
        "traceback": traceback and traceback[-TRACEBACK_LETTERS:],
    }


def _state(rows: list[Row]) -> str:
    if not rows:
        return "the task was removed"
    return f"the task is {rows[0]['status']}, at attempt {rows[0]['attempt']}"
