"""Renew a task's lease in a background thread while the task runs."""

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


class LeaseRenewer:
    """Context manager in which a thread renews the task's lease; sets `lease_lost` if that fails.

    `report_progress` is sent with the next renewal, `report_run` immediately; both are signs of
    life. With `hang_after`, work without a sign of life for that many seconds counts as hung:
    `work_hung` is set and the lease is no longer renewed, so that it expires even if nothing can
    interrupt the work. `on_end` is called (in the thread) if the lease is lost or the work hangs.
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
        self.lease_lost, self.work_hung = threading.Event(), threading.Event()
        self._last_sign = time.monotonic()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._progress: dict[str, Any] | None = None
        self._run: dict[str, Any] | None = None
        self._thread = threading.Thread(
            target=self._renewal_loop, name=f"lease of task {task['_id']}", daemon=True
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
        """Stop renewing; a lease lost after this is not reported."""
        self._stop.set()
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)  # do not wait for a thread that waits for the store

    def report_progress(self, progress: Mapping[str, Any]) -> None:
        """Store progress with the next renewal."""
        with self._lock:
            self._progress, self._last_sign = dict(progress), time.monotonic()

    def report_run(self, run: Mapping[str, Any]) -> None:
        """Store the task's run immediately; a later attempt resumes it."""
        with self._lock:
            self._run, self._last_sign = dict(run), time.monotonic()
        self._wake.set()

    def beat(self, stage: str, details: Mapping[str, Any]) -> None:
        """Report a heartbeat (a listener of `qtorch.core.heartbeat`)."""
        if stage == "run":
            self.report_run({"tracking_uri": None, **details})
        else:
            self.report_progress({"stage": stage, **details})

    def _renewal_loop(self) -> None:
        while not self._stop.is_set():
            seconds_left = self._seconds_until_hung()
            self._wake.wait(max(0.0, min(self.manager.renew_every, seconds_left)))
            self._wake.clear()
            if self._stop.is_set():
                return
            if self._seconds_until_hung() <= 0:
                self._end_work(self.work_hung)
                return
            with self._lock:
                progress, run = self._progress, self._run
                self._progress = self._run = None
            try:
                self._renew(progress, run)
            except LeaseLost as error:
                # After a commit or return of the task the lease is gone, but not lost.
                if not self._stop.is_set() and not self.task.is_settling:
                    log.warning("%s", error)
                    self._end_work(self.lease_lost)
                return
            except Exception:  # for example a store that was unavailable for too long
                log.exception("task %s: could not renew the lease", self.task["_id"])

    def _seconds_until_hung(self) -> float:
        """Return the seconds until work without a further sign of life counts as hung."""
        if self.hang_after is None:
            return math.inf
        with self._lock:
            return self._last_sign + self.hang_after - time.monotonic()

    def _end_work(self, reason: threading.Event) -> None:
        reason.set()
        if self.on_end is not None:
            self.on_end()

    def _renew(self, progress: dict[str, Any] | None, run: dict[str, Any] | None) -> None:
        try:
            self.manager.renew(self.task, progress=progress, run=run)
        except TaskResultError as error:
            log.warning("task %s: cannot store its progress: %s", self.task["_id"], error)
            self.manager.renew(self.task, run=run)
