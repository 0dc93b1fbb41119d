"""The background sender of one run: training never waits for the store, nothing gets lost."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

from qtorch.core.errors import TrackingError
from qtorch.tracking.locations import redacted
from qtorch.tracking.outbox import (
    MAX_METRICS,
    Entry,
    Journal,
    deliver,
    keep_refused,
    next_batch,
)

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds that entries gather before they are sent as one request
LONGEST_PAUSE = 30.0
BUSY_SECONDS = 120.0  # how long the end of a run waits for a store that has not failed
PATIENCE_VARIABLE = "QTORCH_TRACKING_PATIENCE"
DEFAULT_PATIENCE = 30.0


def patience() -> float:
    """Seconds that the end of a run waits for a store that is away: QTORCH_TRACKING_PATIENCE."""
    return float(os.environ.get(PATIENCE_VARIABLE, DEFAULT_PATIENCE))


class Sender:
    """Entries go to the journal at once and to the store from a thread, in batches, in order.

    A store that fails is asked again with growing pauses. `undelivered` of `close` stay in the
    journal's file.
    """

    def __init__(self, store: MLflowStore, run_id: str, attempt: int) -> None:
        self._store, self._run_id, self._attempt = store, run_id, attempt
        self._reset()

    def _reset(self) -> None:
        self.journal = Journal(self._run_id, self._store.uri, self._attempt)
        self._queue: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._wanted = 0  # flushes asked for so far
        self._tried = 0  # flushes that an attempt has followed
        self._closing = False
        self._error: TrackingError | None = None

    def put(self, entries: Sequence[Entry]) -> None:
        """Take entries; returns at once."""
        if not entries:
            return
        if self._pid != os.getpid():
            self._reset()  # a forked child has its own: the parent sends what the parent took
            Finalize(None, self.close, exitpriority=10)  # such a child runs no atexit
        self.journal.append(entries)
        with self._changed:
            self._queue.extend(entries)
            self._start()
            self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._work, name=f"qtorch-{self._run_id}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends: `flush` and `close` send themselves
            log.debug("no thread sends the entries of run %s", self._run_id)
            return
        self._thread = thread

    def flush(self, timeout: float | None = None) -> bool:
        """Send what is here; True once the store has it, False where it does not take it now."""
        if self._pid != os.getpid():
            return True
        end = time.monotonic() + (patience() if timeout is None else timeout)
        with self._changed:
            self._wanted += 1
            mine = self._wanted
            self._changed.notify_all()
            while self._queue and self._thread is not None:
                failed = self._error is not None and self._tried >= mine
                left = end - time.monotonic()
                if failed or left <= 0:
                    return False
                self._changed.wait(left)
        if self._thread is None and self._queue:
            self._send_all()
        return not self._queue

    def close(self, timeout: float | None = None) -> TrackingError | None:
        """Send the rest; None, or why some of it stays on disk.

        A store that fails is asked again for `timeout` seconds (`patience()`), one that is merely
        slow gets BUSY_SECONDS more.
        """
        if self._pid != os.getpid():
            return None
        begin, pause = time.monotonic(), 0.2
        allowed = patience() if timeout is None else timeout
        while not self.flush(BUSY_SECONDS):
            left = begin + allowed - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
            pause *= 2
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            rest, error = len(self._queue), self._error
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if rest:
            where = redacted(self._store.uri)
            return error or TrackingError(f"the tracking store {where} took too long.")
        return None

    def _work(self) -> None:
        pause = 1.0
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._tried = self._wanted
                    self._changed.notify_all()
                    self._changed.wait()
                if self._closing:
                    return
                if self._wanted == self._tried:
                    self._changed.wait_for(self._urgent, INTERVAL)
                asked = self._wanted
            fine = self._send_all()
            with self._changed:
                self._tried = max(self._tried, asked)
                self._changed.notify_all()
                if not fine and not self._closing:
                    self._changed.wait_for(self._urgent, pause)
            pause = 1.0 if fine else min(2 * pause, LONGEST_PAUSE)

    def _urgent(self) -> bool:
        return self._closing or self._wanted > self._tried

    def _send_all(self) -> bool:
        """Send batch after batch; False where the store does not take one now."""
        while self._queue:
            with self._changed:
                batch = list(islice(self._queue, MAX_METRICS))
            batch = batch[: next_batch(batch)]
            try:
                refused = deliver(self._store, self._run_id, batch)
            except TrackingError as error:
                if self._error is None:
                    log.warning(
                        "run %s: %s What is logged is kept in %s and sent as soon as it answers.",
                        self._run_id,
                        error,
                        self.journal.path,
                    )
                self._error = error
                return False
            if self._error is not None:
                log.warning("run %s: the tracking store answers again", self._run_id)
            self._error = None
            keep_refused(self.journal.path, self._run_id, refused)
            with self._changed:
                for _ in batch:
                    self._queue.popleft()
                self.journal.settle(len(batch))
                self._changed.notify_all()
        return True
