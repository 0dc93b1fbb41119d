"""Delivery of logged entries to the tracking store: each one arrives, and arrives once.

A `Ledger` knows the metrics and params that a run already has and drops repetitions. A `Sender`
sends new entries from a background thread. Before that it appends them to a `Journal`, a JSON
Lines file in the outbox (`QTORCH_OUTBOX`, else `~/.cache/qtorch/outbox`), which is deleted once
the store has all of its entries. So nothing is lost if the server is unreachable or the process is
killed with SIGKILL: a resumed run sends what its earlier attempt left, and `send_outbox`
(`qtorch tracking send`) sends everything.

Each line is one entry: `{"metric", "value", "time", "step"}`, `{"param", "value"}`,
`{"tag", "value"}`, `{"artifact", "folder", "replaces"}` (a copied file next to it, which could not
be uploaded at once) or `{"status", "time"}`. The status is sent last, when the store has all other
entries of the run, so that a FINISHED run is complete.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.util import Finalize
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import TrackingError
from qtorch.core.secrets import redact_urls
from qtorch.tracking.locations import outbox_folder
from qtorch.tracking.store_types import MetricPoint, NotInStoreError, RefusedError, RunRow

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore


log = logging.getLogger(__name__)

FORMAT = 1
# Number of times the run was started; a status belongs to one attempt.
ATTEMPT_TAG = "qtorch.attempt"
MAX_METRICS, MAX_PARAMS_AND_TAGS = 1000, 100  # in one request
# Seconds to collect entries before they are sent as one request: for a single run, and at most. A
# process that has several runs at once (a fleet) collects longer, so that the store has no more
# requests to answer than from a process with one run.
INTERVAL, MAX_INTERVAL = 1.0, 10.0
MAX_PAUSE = 30.0  # seconds between attempts to reach a failing store
BUSY_SECONDS = 120.0  # how long the end of a run waits for a slow store that has not failed
PATIENCE_VARIABLE = "QTORCH_TRACKING_PATIENCE"
DEFAULT_PATIENCE = 30.0
Entry = dict[str, Any]


class Ledger:
    """Metrics and params of one run: those of earlier attempts and of this process.

    The first value of a (metric, step) counts. The same value again is dropped; a different one is
    dropped with a warning, because a store would keep both and show either of them. Without a
    step, the n-th value that this process logs for a key gets step n - 1, so that a program that
    is run again repeats its steps. If that step already has another value, the new value goes
    after the last step.
    """

    def __init__(
        self,
        metrics: Mapping[str, Mapping[int, float]] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.metrics = {key: dict(steps) for key, steps in (metrics or {}).items()}
        self.params = dict(params or {})
        self._next_steps: dict[str, int] = {}
        self._warned_keys: set[str] = set()
        self._lock = threading.Lock()

    def record_metric(self, key: str, value: float, step: int | None) -> int | None:
        """Record a metric value; return the step to send it with, None if the step has a value."""
        with self._lock:
            steps = self.metrics.setdefault(key, {})
            if step is None:
                step = self._next_steps.get(key, 0)
                self._next_steps[key] = step + 1
                if step in steps and not _is_same_value(steps[step], value):
                    step = max(steps) + 1
                    self._next_steps[key] = step + 1
            if step not in steps:
                steps[step] = value
                return step
            if not _is_same_value(steps[step], value) and key not in self._warned_keys:
                self._warned_keys.add(key)
                log.warning(
                    "metric %r at step %d already has the value %r; the new value %r is not sent "
                    "(further differences of this metric are not reported)",
                    key,
                    step,
                    steps[step],
                    value,
                )
            return None

    def record_param(self, key: str, value: str) -> str | None:
        """Record a param; return None if it is new, else the value that it already has."""
        with self._lock:
            if key in self.params:
                return self.params[key]
            self.params[key] = value
            return None


def _is_same_value(a: float, b: float) -> bool:
    """Whether two values are equal up to a database's rounding; NaN equals NaN."""
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-12)


class Sender:
    """Writes entries to the journal at once, and sends them to the store from a thread.

    Metrics, params and tags are sent in batches and in order, then artifacts, then the status. A
    failing store is retried after growing pauses. Entries that are unsent at `close` stay in the
    journal's file.
    """

    def __init__(self, store: MLflowStore, run_id: str, attempt: int) -> None:
        self._store, self._run_id, self._attempt = store, run_id, attempt
        self._start_empty()

    def _start_empty(self) -> None:
        self.journal = Journal(self._run_id, self._store.uri, self._attempt)
        # In the order in which they are sent: values, artifacts, status.
        self._queues: tuple[deque[Entry], ...] = (deque(), deque(), deque())
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._flushes_requested = 0  # calls of `flush` so far
        self._flushes_attempted = 0  # calls of `flush` followed by an attempt to send
        self._closing = False
        self._error: TrackingError | None = None

    @property
    def has_files(self) -> bool:
        """Whether artifacts wait to be sent; a later one must then wait too."""
        return self._pid == os.getpid() and bool(self._queues[1])

    @property
    def _num_unsent(self) -> int:
        return sum(map(len, self._queues))

    def enqueue(self, entries: Sequence[Entry]) -> None:
        """Add entries to the queue; returns immediately."""
        if not entries:
            return
        self._separate_from_parent()
        self.journal.append(entries)
        self._add(entries)

    def enqueue_file(self, local: Path, folder: str | None, replaces: Collection[str] = ()) -> Path:
        """Copy a file or folder to the outbox, add it to the queue and return the copy's path.

        The file, or the content of the folder, is uploaded into the run's `folder` (see
        `MLflowStore.upload`).
        """
        self._separate_from_parent()
        entry = self.journal.save_file(local, folder, replaces)
        self._add([entry])
        return self.journal.files / str(entry["artifact"])

    def _separate_from_parent(self) -> None:
        """Let a forked child send only its own entries; the parent sends those it enqueued."""
        if self._pid != os.getpid():
            self._start_empty()
            # A child of multiprocessing does not run atexit functions.
            Finalize(None, self.close, exitpriority=10)

    def _add(self, entries: Sequence[Entry]) -> None:
        with self._condition:
            for entry in entries:
                self._queues[_stage(entry)].append(entry)
            self._start_thread()
            self._condition.notify_all()

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        thread = SenderThread(target=self._run, name=f"qtorch-{self._run_id}", daemon=True)
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
        deadline = time.monotonic() + (_patience_seconds() if timeout is None else timeout)
        with self._condition:
            self._flushes_requested += 1
            own_flush = self._flushes_requested
            self._condition.notify_all()
            while self._num_unsent and self._thread is not None:
                has_failed = self._error is not None and self._flushes_attempted >= own_flush
                time_left = deadline - time.monotonic()
                if has_failed or time_left <= 0:
                    return False
                self._condition.wait(time_left)
        if self._thread is None and self._num_unsent:
            self._send_all()
        return not self._num_unsent

    def close(self, timeout: float | None = None) -> TrackingError | None:
        """Send the rest of the queue; return None, or the error if entries remain on disk.

        A failing store is retried for `timeout` seconds (by default `_patience_seconds()`); one
        that is only slow gets BUSY_SECONDS more.
        """
        if self._pid != os.getpid():
            return None
        start, pause = time.monotonic(), 0.2
        allowed_seconds = _patience_seconds() if timeout is None else timeout
        while not self.flush(BUSY_SECONDS):
            time_left = start + allowed_seconds - time.monotonic()
            if time_left <= 0:
                break
            time.sleep(min(pause, time_left))
            pause *= 2
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            num_unsent, error = self._num_unsent, self._error
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if num_unsent:
            store_uri = redact_urls(self._store.uri)
            return error or TrackingError(f"the tracking store {store_uri} was too slow.")
        return None

    def _run(self) -> None:
        pause = 1.0
        while True:
            with self._condition:
                while not self._num_unsent and not self._closing:
                    self._flushes_attempted = self._flushes_requested
                    self._condition.notify_all()
                    self._condition.wait()
                if self._closing:
                    return
                if self._flushes_requested == self._flushes_attempted:
                    self._condition.wait_for(self._must_send_now, _collecting_seconds())
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
        while queue := next(filter(None, self._queues), None):
            if self._closing:  # given up: by now another process may have resumed the run
                return False
            with self._condition:
                batch = list(islice(queue, MAX_METRICS))
            batch = batch[: _count_batch(batch)]
            try:
                if "status" in batch[0]:
                    self._send_earlier_files()
                rejected_entries = _send_batch(self._store, self._run_id, batch, self.journal.files)
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
            _save_rejected_entries(self.journal.path, self._run_id, rejected_entries)
            with self._condition:
                for _ in batch:
                    queue.popleft()
                self.journal.remove_pending(len(batch))
                self._condition.notify_all()
        return True

    def _send_earlier_files(self) -> None:
        """Send what earlier attempts and forked children left; raise TrackingError if that fails.

        The run must not get its status before.
        """
        paths = [p for p in outbox_files(self._run_id) if p != self.journal.path]
        for delivery in _send_files(paths, self._store.uri):
            if delivery.error is not None:
                raise TrackingError(f"could not send {delivery.path}: {delivery.error}")


class SenderThread(threading.Thread):
    """The thread of a sender."""


def _collecting_seconds() -> float:
    """Return how long a run's entries are collected, by the number of runs that send."""
    num_runs = sum(isinstance(thread, SenderThread) for thread in threading.enumerate())
    return min(INTERVAL * max(1, num_runs), MAX_INTERVAL)


def _patience_seconds() -> float:
    """Return how long the end of a run waits for an unreachable store, in seconds."""
    return float(os.environ.get(PATIENCE_VARIABLE, DEFAULT_PATIENCE))


class Journal:
    """The outbox file of one attempt at a run. It exists only while entries are unconfirmed."""

    def __init__(self, run_id: str, uri: str, attempt: int) -> None:
        self._header = {
            "outbox": FORMAT,
            "run": run_id,
            "uri": redact_urls(uri),
            "attempt": attempt,
        }
        self.path = outbox_folder() / f"{run_id}.{uuid.uuid4().hex[:8]}.jsonl"
        self.files = _files_folder(self.path)
        self._handle: int | None = None
        self._pending = self._num_files = 0
        self._has_failed = False
        self._lock = threading.Lock()

    def append(self, entries: Sequence[Entry]) -> None:
        """Append entries to the file. A failing disk is reported once and does not stop sending."""
        with self._lock:
            header = [self._header] if not self._pending else []
            self._pending += len(entries)
            text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in [*header, *entries])
            try:
                self._write(text.encode())
            except OSError as error:
                if not self._has_failed:
                    log.warning("could not write entries to the outbox %s: %s", self.path, error)
                self._has_failed = True

    def _write(self, data: bytes) -> None:
        self._open()
        assert self._handle is not None
        while data:
            data = data[os.write(self._handle, data) :]

    def _open(self) -> None:
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self.path, flags, 0o600)
            # The lock shows other processes that this one is alive.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove_pending(self, count: int) -> None:
        """Count entries that the store has confirmed; truncate the file when none are pending."""
        with self._lock:
            self._pending -= count
            if not self._pending and self._handle is not None:
                os.ftruncate(self._handle, 0)

    def save_file(self, local: Path, folder: str | None, replaces: Collection[str] = ()) -> Entry:
        """Copy a file or folder to the outbox until it can be sent, and append its entry.

        Each copy has a folder of its own, because a later file may have the same name.
        """
        with self._lock:
            self._open()
            self._num_files += 1
            name = f"{self._num_files}/{local.name}"
        copy = self.files / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if local.is_dir():
            shutil.copytree(local, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(local, copy)
        entry: Entry = {"artifact": name, "folder": folder, "replaces": sorted(replaces)}
        self.append([entry])
        return entry

    def close(self) -> int:
        """Close the file, delete it if nothing is pending; return the number of pending entries."""
        with self._lock:
            if self._handle is not None:
                if not self._pending:
                    _remove_outbox_file(self.path)
                os.close(self._handle)
                self._handle = None
            return self._pending


def _files_folder(path: Path) -> Path:
    """Return the folder with the copied artifacts of an outbox file."""
    return path.with_suffix(".files")


def _remove_outbox_file(path: Path) -> None:
    path.unlink(missing_ok=True)  # first: a copy may only be missing if no entry names it
    shutil.rmtree(_files_folder(path), ignore_errors=True)


def _stage(entry: Entry) -> int:
    """Return 0 for a value, 1 for an artifact, 2 for a status: the order of delivery."""
    return 2 if "status" in entry else int("artifact" in entry)


def _send_batch(
    store: MLflowStore, run_id: str, batch: Sequence[Entry], files: Path
) -> list[tuple[Entry, str]]:
    """Send the entries of one request; return those rejected for good, with the reasons.

    Raises TrackingError if the store is unavailable; the entries can then be sent again later.
    """
    entry = batch[0]
    try:
        if "status" in entry:
            store.set_status(run_id, entry["status"], entry["time"])
        elif "artifact" in entry:
            local = files / entry["artifact"]
            if not local.exists():
                return [(entry, f"the copy {local} is missing")]
            store.upload(run_id, local, entry["folder"], entry.get("replaces", ()))
        else:
            return _send_entries(store, run_id, batch)
    except RefusedError as error:
        return [(entry, str(error))]
    return []


def _send_entries(
    store: MLflowStore, run_id: str, entries: Sequence[Entry]
) -> list[tuple[Entry, str]]:
    """Send metrics, params and tags; return the rejected ones (see `_send_batch`)."""
    metrics = [
        MetricPoint(e["metric"], e["value"], e["time"], e["step"]) for e in entries if "metric" in e
    ]
    params = {e["param"]: e["value"] for e in entries if "param" in e}
    tags = {e["tag"]: e["value"] for e in entries if "tag" in e}
    if not (metrics or params or tags):
        return []
    try:
        store.log_batch(run_id, metrics, params, tags)
    except RefusedError as error:
        if len(entries) == 1:
            return [(entries[0], str(error))]
        middle = len(entries) // 2
        return [
            *_send_entries(store, run_id, entries[:middle]),
            *_send_entries(store, run_id, entries[middle:]),
        ]
    return []


def _count_batch(entries: Sequence[Entry]) -> int:
    """Return how many entries of one stage fit into one request."""
    if _stage(entries[0]):
        return 1
    num_others = 0
    for k, entry in enumerate(entries[:MAX_METRICS]):
        num_others += "metric" not in entry
        if num_others > MAX_PARAMS_AND_TAGS:
            return k
    return min(len(entries), MAX_METRICS)


@dataclass
class Delivery:
    """The outcome of sending one outbox file; with `is_final` sending it again is useless."""

    path: Path
    run_id: str
    num_sent: int = 0
    num_skipped: int = 0
    rejections: list[str] = field(default_factory=list)
    error: str | None = None
    is_final: bool = False


def outbox_files(run_id: str | None = None, folder: str | Path | None = None) -> list[Path]:
    """Return the outbox files of one run or of all runs, the oldest first."""
    files = Path(folder or outbox_folder()).glob(f"{run_id or '*'}.*.jsonl")
    return sorted(files, key=lambda p: p.stat().st_mtime if p.exists() else 0.0)


def send_outbox(
    run_id: str | None = None,
    *,
    tracking_uri: str | None = None,
    folder: str | Path | None = None,
) -> list[Delivery]:
    """Send the files in the outbox (or in `folder`) of one run or of all runs; return the outcomes.

    Files of running processes are skipped. A file is removed once the store has all of its
    entries, so that this function can be called repeatedly. A run gets its status after the
    entries of all its files. `tracking_uri` replaces the URI in the files, which is stored without
    its password (`resolve_uri` completes it). An unreachable store raises no error; it is in
    `Delivery.error`.
    """
    return _send_files(outbox_files(run_id, folder), tracking_uri)


def _send_files(paths: Sequence[Path], tracking_uri: str | None) -> list[Delivery]:
    deliveries: list[Delivery] = []
    for path in sorted(paths, key=_has_status):
        run_id = path.name.split(".")[0]
        failures = [d for d in deliveries if d.run_id == run_id and d.error is not None]
        if failures and _has_status(path):
            error = f"{failures[0].path} of the same run must be sent first"
            deliveries.append(Delivery(path, run_id, error=error))
        elif (delivery := _send_unless_in_use(path, tracking_uri)) is not None:
            deliveries.append(delivery)
    return deliveries


def _has_status(path: Path) -> bool:
    """Whether an outbox file contains the status of its run."""
    return path.exists() and b'\n{"status"' in path.read_bytes()


def _send_unless_in_use(path: Path, tracking_uri: str | None) -> Delivery | None:
    """Send a file; return None if it is empty, already sent, or that of a running process."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _send_file(path, tracking_uri) if path.exists() else None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        log.info("skipped %s: it belongs to a running process", path)
        return None
    except (TrackingError, OSError, ValueError, KeyError) as error:
        log.warning("could not send %s: %s", path, error)
        is_final = not isinstance(error, TrackingError) or isinstance(
            error, NotInStoreError | RefusedError
        )
        return Delivery(path, path.name.split(".")[0], error=str(error), is_final=is_final)


def _read_entries(path: Path) -> tuple[Entry | None, list[Entry]]:
    lines = path.read_bytes().split(b"\n")
    partial_line = lines.pop()
    if partial_line:
        log.warning("the last line of %s is incomplete: its process died while writing it", path)
    if not lines:
        return None, []
    entries = []
    for line in filter(None, lines):
        try:
            entries.append(json.loads(line))
        except ValueError:
            log.warning("a line of %s is corrupted (was the disk full?): %r", path, line[:200])
    headers = [e for e in entries if "outbox" in e]
    if not headers or headers[0]["outbox"] > FORMAT:
        raise ValueError(f"{path} is not an outbox file that this version of qtorch can read.")
    return headers[0], [e for e in entries if "outbox" not in e]


def _send_file(path: Path, tracking_uri: str | None) -> Delivery | None:
    """Send one file's entries that the store lacks, and remove the file; None if it is empty."""
    from qtorch.tracking.mlflow_store import open_store

    header, entries = _read_entries(path)
    if header is None:
        _remove_outbox_file(path)  # the process ended before it wrote anything
        return None
    store = open_store(tracking_uri or header["uri"])
    run = store.run(header["run"])
    # A later attempt at the run has values of its own, which must not be replaced by older ones.
    is_late = run.tags.get(ATTEMPT_TAG, "1") != str(header["attempt"])
    files = _files_folder(path)
    new_entries = _select_new_entries(store, run, entries)
    if is_late:
        new_entries = [e for e in new_entries if not _is_outdated(store, run, e, files)]
    rejected_entries: list[tuple[Entry, str]] = []
    unsent = sorted(new_entries, key=_stage)
    while unsent:
        stage = _stage(unsent[0])
        count = _count_batch([e for e in unsent if _stage(e) == stage])
        rejected_entries += _send_batch(store, run.id, unsent[:count], files)
        unsent = unsent[count:]
    _save_rejected_entries(path, run.id, rejected_entries)
    _remove_outbox_file(path)
    return Delivery(
        path,
        run.id,
        num_sent=len(new_entries) - len(rejected_entries),
        num_skipped=len(entries) - len(new_entries),
        rejections=[reason for _, reason in rejected_entries],
    )


def _select_new_entries(store: MLflowStore, run: RunRow, entries: list[Entry]) -> list[Entry]:
    """Return the entries without the metrics and params that the run already has."""
    keys = {e["metric"] for e in entries if "metric" in e}
    history = store.history(run.id, sorted(keys & set(run.metrics)))
    return [
        e
        for e in entries
        if ("metric" in e and e["step"] not in history.get(e["metric"], ()))
        or ("param" in e and run.params.get(e["param"]) != e["value"])
        or not {"metric", "param"} & set(e)
    ]


def _is_outdated(store: MLflowStore, run: RunRow, entry: Entry, files: Path) -> bool:
    """Whether a late entry would replace what a later attempt at the run has stored."""
    if "artifact" in entry:
        local, folder = files / entry["artifact"], entry["folder"]
        names = {p.name for p in local.iterdir()} if local.is_dir() else {local.name}
        return bool(names & {PurePosixPath(p).name for p, _ in store.artifacts(run.id, folder)})
    return "status" in entry or entry.get("tag") in run.tags


# The runs of this process that ended before the store had all of their entries, with its URI.
_undelivered_runs: dict[str, str] = {}


def add_undelivered_run(run_id: str, uri: str) -> None:
    """Remember that a run has ended with entries in the outbox, for `wait_for_delivery`."""
    _undelivered_runs[run_id] = uri


@contextmanager
def wait_for_delivery(report_waiting: Callable[[], object]) -> Iterator[None]:
    """After the block, wait until the store has everything that runs inside it have logged.

    While the store is away `report_waiting` is called once per second. Raises TrackingError if an
    entry can never be sent.
    """
    earlier_runs = set(_undelivered_runs)
    yield
    for run_id in _undelivered_runs.keys() - earlier_runs:
        uri = _undelivered_runs.pop(run_id)
        log.warning("run %s: waiting until the tracking store answers again", run_id)
        pause = 1.0
        while any(p.stat().st_size for p in outbox_files(run_id) if p.exists()):
            for delivery in send_outbox(run_id, tracking_uri=uri):
                if delivery.is_final:
                    raise TrackingError(f"run {run_id} cannot be delivered: {delivery.error}")
            end = time.monotonic() + pause
            while time.monotonic() < end and outbox_files(run_id):
                report_waiting()
                time.sleep(min(1.0, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, MAX_PAUSE)
        log.warning("run %s: everything is delivered", run_id)


def _save_rejected_entries(
    path: Path, run_id: str, rejected_entries: Iterable[tuple[Entry, str]]
) -> None:
    """Report entries that the store rejected for good, and save them to a `.refused` file."""
    for entry, reason in rejected_entries:
        target = path.with_suffix(".refused")
        log.error("run %s: the store rejected %s (%s); saved to %s", run_id, entry, reason, target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, "reason": reason}, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("could not write entries to %s: %s", target, error)
