"""What the tracking store has not confirmed yet, on disk, and its later delivery.

Everything that a run logs is first appended to a file of JSON lines in the outbox
(`QTORCH_OUTBOX`, else `~/.cache/qtorch/outbox`), and the file goes once the store has all of it.
So neither a server that is away nor a process killed with -9 loses what was logged: a resumed run
delivers what its earlier attempt left, and `send()` (`qtorch tracking send`) does so for all.

One line is one entry: `{"metric", "value", "time", "step"}`, `{"param", "value"}`,
`{"tag", "value"}`, `{"artifact", "folder"}` (a file kept beside the lines) or `{"status", "time"}`.
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
from qtorch.tracking.locations import default_uri, outbox_folder, redacted
from qtorch.tracking.rows import MetricPoint

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

FORMAT = 1
ATTEMPT_TAG = "qtorch.attempt"  # how often the run was started: a late status is of one attempt
MAX_METRICS, MAX_OTHERS = 1000, 100
Entry = dict[str, Any]


class Journal:
    """The outbox file of one attempt of one run; there only while something is unconfirmed."""

    def __init__(self, run_id: str, uri: str, attempt: int) -> None:
        self._head = {"outbox": FORMAT, "run": run_id, "uri": redacted(uri), "attempt": attempt}
        self.path = outbox_folder() / f"{run_id}.{uuid.uuid4().hex[:8]}.jsonl"
        self._handle: int | None = None
        self._pending = 0
        self._broken = False
        self._lock = threading.Lock()

    def append(self, entries: Sequence[Entry]) -> None:
        """Put entries on disk. A disk that takes none is reported once; sending goes on."""
        with self._lock:
            first = [self._head] if not self._pending else []
            self._pending += len(entries)
            text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in [*first, *entries])
            try:
                self._write(text.encode())
            except OSError as error:
                if not self._broken:
                    log.warning("the outbox %s takes no entries: %s", self.path, error)
                self._broken = True

    def _write(self, data: bytes) -> None:
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self.path, flags, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # "its process lives"
        while data:
            data = data[os.write(self._handle, data) :]

    def settle(self, count: int) -> None:
        """So many entries are with the store; with the last one the file is emptied."""
        with self._lock:
            self._pending -= count
            if not self._pending and self._handle is not None:
                os.ftruncate(self._handle, 0)

    def keep_file(self, local: Path, folder: str | None) -> Path:
        """Keep a copy of an artifact until it can be sent; where it lies."""
        name = f"{folder}/{local.name}" if folder else local.name
        kept = self.path.with_suffix(".files") / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        if local.is_dir():
            shutil.copytree(local, kept, dirs_exist_ok=True)
        else:
            shutil.copyfile(local, kept)
        self.append([{"artifact": name, "folder": folder}])
        return kept

    def close(self) -> int:
        """How many entries stay on disk; the file goes where there are none."""
        with self._lock:
            if self._handle is not None:
                if not self._pending:
                    self.path.unlink(missing_ok=True)
                os.close(self._handle)
                self._handle = None
            return self._pending


def deliver(store: MLflowStore, run_id: str, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """Send metrics, params and tags; those that the store refuses for good, with its reason.

    Raises TrackingError where it does not take any: sending them again later is right.
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
            *deliver(store, run_id, entries[:middle]),
            *deliver(store, run_id, entries[middle:]),
        ]
    return []


def next_batch(entries: Sequence[Entry]) -> int:
    """How many entries from the front fit one request."""
    metrics = others = 0
    for k, entry in enumerate(entries):
        if "metric" in entry:
            metrics += 1
        else:
            others += 1
        if metrics > MAX_METRICS or others > MAX_OTHERS or metrics + others > MAX_METRICS:
            return k
    return len(entries)


@dataclass
class Delivery:
    """What came of one outbox file."""

    path: Path
    run_id: str
    sent: int = 0
    already_there: int = 0
    refused: list[str] = field(default_factory=list)
    error: str | None = None


def waiting(run_id: str | None = None, folder: str | Path | None = None) -> list[Path]:
    """The outbox files of one run or all, the oldest first."""
    files = Path(folder or outbox_folder()).glob(f"{run_id or '*'}.*.jsonl")
    return sorted(files, key=lambda p: p.stat().st_mtime if p.exists() else 0.0)


def send(
    run_id: str | None = None,
    *,
    tracking_uri: str | None = None,
    folder: str | Path | None = None,
) -> list[Delivery]:
    """Deliver what waits in the outbox (or another `folder`), of one run or all.

    What came of each file is returned.

    Files of processes that still run are left to them. A file is removed once the store has all
    of it, so that this can be called again. `tracking_uri` replaces the one in the files, which
    lack its password. No error is raised for a store that is away: `Delivery.error` tells.
    """
    from qtorch.tracking.mlflow_store import store_at

    done = []
    for path in waiting(run_id, folder):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s belongs to a process that runs; it sends it itself", path)
                continue
            try:
                head, entries = _read(path)
                if head is None:
                    path.unlink(missing_ok=True)  # its process ended before it wrote a thing
                    continue
                report = Delivery(path, head["run"])
                done.append(report)
                _send_file(store_at(tracking_uri or _uri_of(head)), head, entries, report)
            except (TrackingError, OSError, ValueError, KeyError) as error:
                done = [d for d in done if d.path != path]
                done.append(Delivery(path, path.name.split(".")[0], error=str(error)))
                log.warning("%s was not delivered: %s", path, error)
    return done


def _uri_of(head: Entry) -> str:
    """The store of a file: with its password, where it is the one in force."""
    default = default_uri()
    return default if redacted(default) == head["uri"] else str(head["uri"])


def _read(path: Path) -> tuple[Entry | None, list[Entry]]:
    lines = path.read_bytes().split(b"\n")
    cut = lines.pop()
    if cut:
        log.warning("the last line of %s is cut: its process died while writing it", path)
    if not lines:
        return None, []
    entries = []
    for line in filter(None, lines):
        try:
            entries.append(json.loads(line))
        except ValueError:
            log.warning("a line of %s is damaged (was the disk full?): %r", path, line[:200])
    heads = [e for e in entries if "outbox" in e]
    if not heads or heads[0]["outbox"] > FORMAT:
        raise TrackingError(f"{path} is no outbox file that this qtorch can read.")
    return heads[0], [e for e in entries if "outbox" not in e]


def _send_file(store: MLflowStore, head: Entry, entries: list[Entry], report: Delivery) -> None:
    run = store.run(head["run"])
    keys = {e["metric"] for e in entries if "metric" in e}
    history = store.history(run.id, sorted(keys & set(run.metrics)))
    fresh = [
        e
        for e in entries
        if ("metric" in e and e["step"] not in history.get(e["metric"], ()))
        or ("param" in e and run.params.get(e["param"]) != e["value"])
        or not {"metric", "param"} & set(e)
    ]
    report.already_there = len(entries) - len(fresh)
    logged = [e for e in fresh if {"metric", "param", "tag"} & set(e)]
    refused: list[tuple[Entry, str]] = []
    while logged:
        count = next_batch(logged)
        refused += deliver(store, run.id, logged[:count])
        logged = logged[count:]
    files = report.path.with_suffix(".files")
    for entry in (e for e in fresh if "artifact" in e):
        local = files / entry["artifact"]
        folder = entry["artifact"] if local.is_dir() else entry["folder"]
        store.upload(run.id, local, folder)
    if run.tags.get(ATTEMPT_TAG, "1") == str(head["attempt"]):
        for entry in (e for e in fresh if "status" in e):
            store.set_status(run.id, entry["status"], entry["time"])
    report.sent = len(fresh) - len(refused)
    report.refused = [reason for _, reason in refused]
    keep_refused(report.path, run.id, refused)
    shutil.rmtree(files, ignore_errors=True)
    report.path.unlink()


def keep_refused(path: Path, run_id: str, refused: Iterable[tuple[Entry, str]]) -> None:
    """Say what the store refuses for good, and keep it in a file that is not sent again."""
    for entry, reason in refused:
        kept = path.with_suffix(".refused")
        log.error("run %s: the store refuses %s (%s); kept in %s", run_id, entry, reason, kept)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, "reason": reason}, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s takes no entries: %s", kept, error)
