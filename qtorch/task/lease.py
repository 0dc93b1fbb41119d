"""Keeping a lease alive from a thread while the work goes on in another."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qtorch.core.errors import LeaseLost, TaskResultError

if TYPE_CHECKING:
    from qtorch.task.definition import Task
    from qtorch.task.manager import TaskManager

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Inside the block a thread renews the task's lease; `lost` is set where that fails.

    `note(progress)` and `note_run(run)` are sent with the next renewal, a run at once; both are
    signs of life. With `hang_after`, work that gives none for so many seconds counts as hung:
    `hung` is set and the lease is renewed no more, so that it runs out even where nothing can
    interrupt the work. `on_end` is called (in the thread) when the lease is lost or the work hangs.
    """

    def __init__(
        self,
        manager: TaskManager,
        task: Task,
        on_end: Callable[[], None] | None = None,
        *,
        hang_after: float | None = None,
    ) -> None:
        self.manager, self.task, self.on_end, self.hang_after = manager, task, on_end, hang_after
        self.lost, self.hung = threading.Event(), threading.Event()
        self._sign = time.monotonic()
        self._wake, self._end = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._progress: dict[str, Any] | None = None
        self._run: dict[str, Any] | None = None
        self._thread = threading.Thread(
            target=self._keep, name=f"lease of task {task['_id']}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the renewals; a lost lease after this is told to nobody."""
        self._end.set()
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)  # one that waits for an absent store is left behind

    def note(self, progress: Mapping[str, Any]) -> None:
        """What the work is at, for the next renewal."""
        with self._lock:
            self._progress, self._sign = dict(progress), time.monotonic()

    def note_run(self, run: Mapping[str, Any]) -> None:
        """The run that holds the work, sent at once: a later attempt takes it up again."""
        with self._lock:
            self._run, self._sign = dict(run), time.monotonic()
        self._wake.set()

    def beat(self, stage: str, details: Mapping[str, Any]) -> None:
        """A sign of progress as `qtorch.core.heartbeat` tells it."""
        if stage == "run":
            self.note_run({"tracking_uri": None, **details})
        else:
            self.note({"stage": stage, **details})

    def _keep(self) -> None:
        while not self._end.is_set():
            left = self._until_hung()
            self._wake.wait(max(0.0, min(self.manager.renew_every, left)))
            self._wake.clear()
            if self._end.is_set():
                return
            if self._until_hung() <= 0:
                self._tell(self.hung)
                return
            with self._lock:
                progress, run = self._progress, self._run
                self._progress = self._run = None
            try:
                self._renew(progress, run)
            except LeaseLost as error:
                # One that was just committed or given back is not lost.
                if not self._end.is_set() and not self.task.settling:
                    log.warning("%s", error)
                    self._tell(self.lost)
                return
            except Exception:  # such as a store that was away for longer than patience
                log.exception("task %s: its lease could not be renewed", self.task["_id"])

    def _until_hung(self) -> float:
        """Seconds until work that gives no further sign of life counts as hung."""
        if self.hang_after is None:
            return math.inf
        with self._lock:
            return self._sign + self.hang_after - time.monotonic()

    def _tell(self, what: threading.Event) -> None:
        what.set()
        if self.on_end is not None:
            self.on_end()

    def _renew(self, progress: dict[str, Any] | None, run: dict[str, Any] | None) -> None:
        try:
            self.manager.renew(self.task, progress=progress, run=run)
        except TaskResultError as error:
            log.warning("task %s: its progress cannot be stored: %s", self.task["_id"], error)
            self.manager.renew(self.task, run=run)
