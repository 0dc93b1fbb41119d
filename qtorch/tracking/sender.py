"""The background thread that sends a run's entries, so that training never waits for the store."""

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
from qtorch.tracking.locations import redact_password
from qtorch.tracking.outbox import (
    MAX_METRICS,
    Entry,
    Journal,
    count_batch,
    save_rejected_entries,
    send_entries,
)

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds to collect entries before they are sent as one request
MAX_PAUSE = 30.0
BUSY_SECONDS = 120.0  # how long the end of a run waits for a slow store that has not failed
PATIENCE_VARIABLE = "QTORCH_TRACKING_PATIENCE"
DEFAULT_PATIENCE = 30.0


def patience_seconds() -> float:
    """Return how long the end of a run waits for an unreachable store, in seconds."""
    return float(os.environ.get(PATIENCE_VARIABLE, DEFAULT_PATIENCE))


class Sender:
    """Writes entries to the journal at once, and sends them to the store from a thread.

    Entries are sent in batches and in order. A failing store is retried after growing pauses.
    Entries that are unsent at `close` stay in the journal's file.
    """

    def __init__(self, store: MLflowStore, run_id: str, attempt: int) -> None:
        self._store, self._run_id, self._attempt = store, run_id, attempt
        self._start_empty()

    def _start_empty(self) -> None:
        self.journal = Journal(self._run_id, self._store.uri, self._attempt)
        self._queue: deque[Entry] = deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._flushes_requested = 0  # calls of `flush` so far
        self._flushes_attempted = 0  # calls of `flush` followed by an attempt to send
        self._closing = False
        self._error: TrackingError | None = None

    def enqueue(self, entries: Sequence[Entry]) -> None:
        """Add entries to the queue; returns immediately."""
        if not entries:
            return
        if self._pid != os.getpid():
            # A forked child sends only its own entries; the parent sends those that it enqueued.
            self._start_empty()
            # A child of multiprocessing does not run atexit functions.
            Finalize(None, self.close, exitpriority=10)
        self.journal.append(entries)
        with self._condition:
            self._queue.extend(entries)
            self._start_thread()
            self._condition.notify_all()

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._run, name=f"qtorch-{self._run_id}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: `flush` and `close` send
            log.debug("could not start the thread that sends the entries of run %s", self._run_id)
            return
        self._thread = thread

    def flush(self, timeout: float | None = None) -> bool:
        """Send the queue; return True once the store has it, False if sending failed."""
        if self._pid != os.getpid():
            return True
        deadline = time.monotonic() + (patience_seconds() if timeout is None else timeout)
        with self._condition:
            self._flushes_requested += 1
            own_flush = self._flushes_requested
            self._condition.notify_all()
            while self._queue and self._thread is not None:
                has_failed = self._error is not None and self._flushes_attempted >= own_flush
                time_left = deadline - time.monotonic()
                if has_failed or time_left <= 0:
                    return False
                self._condition.wait(time_left)
        if self._thread is None and self._queue:
            self._send_all()
        return not self._queue

    def close(self, timeout: float | None = None) -> TrackingError | None:
        """Send the rest of the queue; return None, or the error if entries remain on disk.

        A failing store is retried for `timeout` seconds (by default `patience_seconds()`); one
        that is only slow gets BUSY_SECONDS more.
        """
        if self._pid != os.getpid():
            return None
        start, pause = time.monotonic(), 0.2
        allowed_seconds = patience_seconds() if timeout is None else timeout
        while not self.flush(BUSY_SECONDS):
            time_left = start + allowed_seconds - time.monotonic()
            if time_left <= 0:
                break
            time.sleep(min(pause, time_left))
            pause *= 2
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            num_unsent, error = len(self._queue), self._error
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if num_unsent:
            store_uri = redact_password(self._store.uri)
            return error or TrackingError(f"the tracking store {store_uri} was too slow.")
        return None

    def _run(self) -> None:
        pause = 1.0
        while True:
            with self._condition:
                while not self._queue and not self._closing:
                    self._flushes_attempted = self._flushes_requested
                    self._condition.notify_all()
                    self._condition.wait()
                if self._closing:
                    return
                if self._flushes_requested == self._flushes_attempted:
                    self._condition.wait_for(self._must_send_now, INTERVAL)
                num_flushes = self._flushes_requested
            is_sent = self._send_all()
            with self._condition:
                self._flushes_attempted = max(self._flushes_attempted, num_flushes)
                self._condition.notify_all()
                if not is_sent and not self._closing:
                    self._condition.wait_for(self._must_send_now, pause)
            pause = 1.0 if is_sent else min(2 * pause, MAX_PAUSE)

    def _must_send_now(self) -> bool:
        return self._closing or self._flushes_requested > self._flushes_attempted

    def _send_all(self) -> bool:
        """Send batch after batch; return False if the store is unavailable."""
        while self._queue:
            with self._condition:
                batch = list(islice(self._queue, MAX_METRICS))
            batch = batch[: count_batch(batch)]
            try:
                rejected_entries = send_entries(self._store, self._run_id, batch)
            except TrackingError as error:
                if self._error is None:
                    log.warning(
                        "run %s: %s Entries are saved to %s and sent as soon as the store answers.",
                        self._run_id,
                        error,
                        self.journal.path,
                    )
                self._error = error
                return False
            if self._error is not None:
                log.warning("run %s: the tracking store is available again", self._run_id)
            self._error = None
            save_rejected_entries(self.journal.path, self._run_id, rejected_entries)
            with self._condition:
                for _ in batch:
                    self._queue.popleft()
                self.journal.remove_pending(len(batch))
                self._condition.notify_all()
        return True
