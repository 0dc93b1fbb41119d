"""The outbox: files with logged entries that the tracking store has not confirmed yet.

Everything that a run logs is first appended to a JSON Lines file in the outbox (`QTORCH_OUTBOX`,
else `~/.cache/qtorch/outbox`). The file is deleted once the store has all of its entries. So
nothing is lost if the server is unreachable or the process is killed with SIGKILL: a resumed run
sends what its earlier attempt left, and `send()` (`qtorch tracking send`) sends everything.

Each line is one entry: `{"metric", "value", "time", "step"}`, `{"param", "value"}`,
`{"tag", "value"}`, `{"artifact", "folder"}` (a copied file next to it) or `{"status", "time"}`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtorch.core.errors import TrackingError
from qtorch.tracking.errors import RefusedError
from qtorch.tracking.locations import default_uri, outbox_folder, redact_password
from qtorch.tracking.rows import MetricPoint

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

FORMAT = 1
ATTEMPT_TAG = (
    "qtorch.attempt"  # number of times the run was started; a status belongs to one attempt
)
MAX_METRICS, MAX_PARAMS_AND_TAGS = 1000, 100
Entry = dict[str, Any]


class Journal:
    """The outbox file of one attempt at a run. It exists only while entries are unconfirmed."""

    def __init__(self, run_id: str, uri: str, attempt: int) -> None:
        self._header = {
            "outbox": FORMAT,
            "run": run_id,
            "uri": redact_password(uri),
            "attempt": attempt,
        }
        self.path = outbox_folder() / f"{run_id}.{uuid.uuid4().hex[:8]}.jsonl"
        self._handle: int | None = None
        self._pending = 0
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
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self.path, flags, 0o600)
            # The lock shows other processes that this one is alive.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while data:
            data = data[os.write(self._handle, data) :]

    def remove_pending(self, count: int) -> None:
        """Count entries that the store has confirmed; truncate the file when none are pending."""
        with self._lock:
            self._pending -= count
            if not self._pending and self._handle is not None:
                os.ftruncate(self._handle, 0)

    def save_file(self, local: Path, folder: str | None) -> Path:
        """Copy an artifact to the outbox until it can be sent, and return the copy's path."""
        name = f"{folder}/{local.name}" if folder else local.name
        copy = self.path.with_suffix(".files") / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if local.is_dir():
            shutil.copytree(local, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(local, copy)
        self.append([{"artifact": name, "folder": folder}])
        return copy

    def close(self) -> int:
        """Close the file, delete it if nothing is pending; return the number of pending entries."""
        with self._lock:
            if self._handle is not None:
                if not self._pending:
                    self.path.unlink(missing_ok=True)
                os.close(self._handle)
                self._handle = None
            return self._pending


def send_entries(
    store: MLflowStore, run_id: str, entries: Sequence[Entry]
) -> list[tuple[Entry, str]]:
    """Send metrics, params and tags; return the entries rejected for good, with the reasons.

    Raises TrackingError if the store is unavailable; the entries can then be sent again later.
    """
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
            *send_entries(store, run_id, entries[:middle]),
            *send_entries(store, run_id, entries[middle:]),
        ]
    return []


def count_batch(entries: Sequence[Entry]) -> int:
    """Return how many entries from the front fit into one request."""
    num_metrics = num_others = 0
    for k, entry in enumerate(entries):
        if "metric" in entry:
            num_metrics += 1
        else:
            num_others += 1
        if (
            num_metrics > MAX_METRICS
            or num_others > MAX_PARAMS_AND_TAGS
            or num_metrics + num_others > MAX_METRICS
        ):
            return k
    return len(entries)


@dataclass
class Delivery:
    """The outcome of sending one outbox file."""

    path: Path
    run_id: str
    num_sent: int = 0
    num_skipped: int = 0
    rejections: list[str] = field(default_factory=list)
    error: str | None = None


def outbox_files(run_id: str | None = None, folder: str | Path | None = None) -> list[Path]:
    """Return the outbox files of one run or of all runs, the oldest first."""
    files = Path(folder or outbox_folder()).glob(f"{run_id or '*'}.*.jsonl")
    return sorted(files, key=lambda p: p.stat().st_mtime if p.exists() else 0.0)


def send(
    run_id: str | None = None,
    *,
    tracking_uri: str | None = None,
    folder: str | Path | None = None,
) -> list[Delivery]:
    """Send the files in the outbox (or in `folder`), of one run or of all runs.

    Returns the outcome for each file.

    Files of running processes are skipped. A file is removed once the store has all of its
    entries, so that this function can be called repeatedly. `tracking_uri` replaces the URI in
    the files, which is stored without its password. An unreachable store raises no error; it is
    in `Delivery.error`.
    """
    from qtorch.tracking.mlflow_store import open_store

    deliveries = []
    for path in outbox_files(run_id, folder):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("skipped %s: it belongs to a running process", path)
                continue
            try:
                header, entries = _read_entries(path)
                if header is None:
                    path.unlink(missing_ok=True)  # the process ended before it wrote anything
                    continue
                delivery = Delivery(path, header["run"])
                deliveries.append(delivery)
                _send_file(
                    open_store(tracking_uri or _target_uri(header)), header, entries, delivery
                )
            except (TrackingError, OSError, ValueError, KeyError) as error:
                deliveries = [d for d in deliveries if d.path != path]
                deliveries.append(Delivery(path, path.name.split(".")[0], error=str(error)))
                log.warning("could not send %s: %s", path, error)
    return deliveries


def _target_uri(header: Entry) -> str:
    """Return the URI to send a file to; the default URI if it is the same, as it has a password."""
    default = default_uri()
    return default if redact_password(default) == header["uri"] else str(header["uri"])


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
        raise TrackingError(f"{path} is not an outbox file that this version of qtorch can read.")
    return headers[0], [e for e in entries if "outbox" not in e]


def _send_file(store: MLflowStore, header: Entry, entries: list[Entry], delivery: Delivery) -> None:
    run = store.run(header["run"])
    keys = {e["metric"] for e in entries if "metric" in e}
    history = store.history(run.id, sorted(keys & set(run.metrics)))
    new_entries = [
        e
        for e in entries
        if ("metric" in e and e["step"] not in history.get(e["metric"], ()))
        or ("param" in e and run.params.get(e["param"]) != e["value"])
        or not {"metric", "param"} & set(e)
    ]
    delivery.num_skipped = len(entries) - len(new_entries)
    batchable = [e for e in new_entries if {"metric", "param", "tag"} & set(e)]
    rejected_entries: list[tuple[Entry, str]] = []
    while batchable:
        count = count_batch(batchable)
        rejected_entries += send_entries(store, run.id, batchable[:count])
        batchable = batchable[count:]
    files = delivery.path.with_suffix(".files")
    for entry in (e for e in new_entries if "artifact" in e):
        local = files / entry["artifact"]
        folder = entry["artifact"] if local.is_dir() else entry["folder"]
        store.upload(run.id, local, folder)
    if run.tags.get(ATTEMPT_TAG, "1") == str(header["attempt"]):
        for entry in (e for e in new_entries if "status" in e):
            store.set_status(run.id, entry["status"], entry["time"])
    delivery.num_sent = len(new_entries) - len(rejected_entries)
    delivery.rejections = [reason for _, reason in rejected_entries]
    save_rejected_entries(delivery.path, run.id, rejected_entries)
    shutil.rmtree(files, ignore_errors=True)
    delivery.path.unlink()


def save_rejected_entries(
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
