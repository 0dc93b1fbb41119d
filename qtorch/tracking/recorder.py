"""Recorder: one run of an MLflow store, and the recorders that are running in this process."""

from __future__ import annotations

import atexit
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

from qtorch.core.errors import (
    ArgumentError,
    LoadObjectError,
    QtorchError,
    TrackingError,
    check_name,
)
from qtorch.core.secrets import redact_urls
from qtorch.core.terminal import html_curves, html_link, html_summary
from qtorch.tracking.artifacts import RunFiles
from qtorch.tracking.delivery import (
    ATTEMPT_TAG,
    Entry,
    Journal,
    Ledger,
    Sender,
    add_undelivered_run,
    send_outbox,
)
from qtorch.tracking.locations import resolve_uri, run_page, server_command
from qtorch.tracking.provenance import command_line, git_changes, qtorch_environment, source_tags
from qtorch.tracking.run_log import RUN_LOG, RunLog
from qtorch.tracking.store_types import (
    MAX_KEY,
    MAX_PARAM,
    MAX_TAG,
    RunRow,
    clean_key,
    format_local_time,
    now_ms,
    parse_metric_value,
    warn_once,
)

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

UNNAMED_RUN = "mlflow_recorder"  # Qlib's name of a run that is started without one

COMMAND_PARAM = "cmd-sys.argv"  # Qlib's name
TEXT_FOLDER = "long_values"
CHANGED_PREFIX = "qtorch.changed_param."
FROM_TAG = "warm_start.from"
DEPTH_TAG = "warm_start.depth"  # number of earlier trainings that the weights went through
PARENT_TAG = "mlflow.parentRunId"  # nests a run under another on MLflow's page
HOST_TAG = "hostname"  # the machine that trains the task of a run; other runs have none

# A read-only mapping, because the default is shared by all contexts.
_initial_tags: ContextVar[Mapping[str, str]] = ContextVar(
    "qtorch_run_tags", default=MappingProxyType({})
)


class MetricRecorder(Protocol):
    """What a running training uses of a recorder: a Recorder, or a stand-in in a rank's process."""

    @property
    def id(self) -> str | None:
        """The run ID."""

    @property
    def uri(self) -> str | None:
        """The URI of the tracking store, or None if the recorder has none."""

    def log_batch(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics of one step; return immediately."""

    def log_params(self, **kwargs: Any) -> None:
        """Log params of the run as text."""

    def set_tags(self, **kwargs: Any) -> None:
        """Set tags of the run."""


class TrainingRecorder(MetricRecorder, Protocol):
    """What a fit uses of a recorder: metrics, tags, and a folder for checkpoints."""

    def checkpoint_dir(self) -> Path:
        """Return the run's checkpoint folder on this machine."""


class Recorder:
    """One run: its params, metrics, tags and artifacts. Corresponds to qlib/workflow/recorder.py.

    A recorder that was created but not yet started is SCHEDULED and has no ID. `start_time` and
    `end_time` are local times as text. Logged values are buffered, written to disk and sent by a
    background thread (see `qtorch.tracking.delivery`). `client` is the MlflowClient, for
    everything that this class does not offer. While the run is active it is MLflow's active run
    too, so that `mlflow.log_metric` and autolog log to it, as in Qlib.
    Difference from Qlib: MLflow is the only backend, so that there is no separate interface.
    """

    STATUS_S = "SCHEDULED"
    STATUS_R = "RUNNING"
    STATUS_FI = "FINISHED"
    STATUS_FA = "FAILED"
    STATUS_K = "KILLED"
    STATUSES = (STATUS_S, STATUS_R, STATUS_FI, STATUS_FA, STATUS_K)

    def __init__(
        self,
        experiment_id: str,
        uri: str,
        name: str | None = None,
        mlflow_run: RunRow | None = None,
        *,
        experiment_name: str | None = None,
    ) -> None:
        self.id: str | None = None
        self.name = name
        self.experiment_id = experiment_id
        self.experiment_name = experiment_name
        self.start_time: str | None = None
        self.end_time: str | None = None
        self.status = self.STATUS_S
        self.owner = 0  # ID of the process in which the run is active, 0 if in none
        self.artifact_uri: str | None = None  # set when the run starts
        self.is_deleted = False
        self._uri = resolve_uri(uri)
        self._ledger: Ledger | None = None
        self._sender: Sender | None = None
        self._run_files: RunFiles | None = None
        self._stop_monitor: Callable[[], None] | None = None
        self._deactivate: Callable[[], None] | None = None
        self._run_log: RunLog | None = None
        self._attempt = 1
        if mlflow_run is not None:
            self._load_row(mlflow_run)

    @property
    def info(self) -> dict[str, Any]:
        """Return class, id, name, experiment_id, start_time, end_time and status."""
        return {
            "class": "Recorder",
            "id": self.id,
            "name": self.name,
            "experiment_id": self.experiment_id,
            "start_time": self.start_time,
            "end_time": self.end_time,
            "status": self.status,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(info={self.info})"

    def _repr_html_(self) -> str:
        """Show the run in a notebook: its metrics, its curves and the address of its page."""
        facts = {"run": self.id, "status": self.status, "started": self.start_time}
        if self.id is None:
            return html_summary(f"Recorder {self.name}", facts)
        metrics = {k: f"{v:.6g}" for k, v in self.list_metrics().items() if "/" not in k}
        curves = {
            key: [value for _, value in sorted(self.metric_history(key).items())]
            for key in ("train/loss", "valid/loss")
        }
        parts = [html_curves({k: v for k, v in curves.items() if len(v) > 1})]
        page = run_page(self.uri, self.experiment_id, self.id)
        parts.append(html_link(page, server_command(self.uri)))
        return html_summary(f"Recorder {self.name}", {**facts, **metrics}, *parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recorder) or self.id is None:
            return self is other
        return self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id) if self.id else id(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end_run(final_status(kind))

    def _load_row(self, run: RunRow) -> None:
        self.id, self.name, self.status = run.id, run.name, run.status
        self.experiment_id = run.experiment_id
        self.start_time = format_local_time(run.start_time)
        self.end_time = format_local_time(run.end_time)
        self.artifact_uri, self.is_deleted = run.artifact_uri, run.is_deleted
        self._attempt = int(run.tags.get(ATTEMPT_TAG, "1"))

    def __getstate__(self) -> dict[str, Any]:
        process_attributes = (
            "_ledger", "_sender", "_run_files", "_stop_monitor", "_deactivate", "_run_log",
        )  # fmt: skip
        return {**self.__dict__, **dict.fromkeys(process_attributes), "owner": 0}

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return self._uri

    @property
    def client(self) -> Any:
        """The MlflowClient of the store."""
        return self._store.client

    @property
    def _store(self) -> MLflowStore:
        from qtorch.tracking.mlflow_store import open_store

        return open_store(self._uri)

    @property
    def _run_id(self) -> str:
        if self.id is None:
            raise TrackingError(
                f"the recorder {self.name!r} has not been started: call start_run() or use "
                "R.start(...)."
            )
        return self.id

    @property
    def _files(self) -> RunFiles:
        if self._run_files is None:
            self._run_files = RunFiles(
                lambda: self._store, self._run_id, self.get_artifact_uri(), self._open_sender
            )
        return self._run_files

    @contextmanager
    def _open_sender(self) -> Iterator[Sender]:
        """Yield the running sender, or one that is closed after the block."""
        if self._sender is not None:
            yield self._sender
            return
        sender = Sender(self._store, self._run_id, self._attempt)
        yield sender
        self._close_journal(sender.journal, sender.close())

    # Start and end

    def set_recorder_name(self, rname: str) -> None:
        """Set the name of the run; TrackingError if it has been started."""
        if self.id is not None:
            raise TrackingError(f"run {self.id} has its name {self.name!r} already.")
        self.name = rname

    def start_run(self) -> Self:
        """Start the run, or resume it if it has an ID; a `with` block then ends it.

        A resumed run first sends what an earlier attempt left in the outbox and reads the run's
        metrics and params, so that nothing is sent twice. Raises TrackingError if the store does
        not answer.
        """
        if self._sender is not None:
            raise TrackingError(f"run {self.id} is already running.")
        is_resumed = self.id is not None
        if is_resumed:
            row = self._reopen()
        else:
            tags = {**source_tags(), **_initial_tags.get(), ATTEMPT_TAG: "1"}
            row = self._store.create_run(self.experiment_id, self.name, tags, now_ms())
            self._load_row(row)
            self._ledger = Ledger()
        self.status, self.end_time = self.STATUS_R, None
        self._sender = Sender(self._store, self._run_id, self._attempt)
        self.owner = os.getpid()
        add_running(self)
        self._run_log = RunLog(
            self._files.log_folder / self._attempt_name(RUN_LOG),
            self._is_current,
        )
        self._activate(row)
        try:
            self._send_earlier_logs()
            self._log_provenance(is_resumed)
            self._start_system_monitor(is_resumed)
        except BaseException:
            self.end_run(self.STATUS_FA)
            raise
        log.info("started run %s", self._title())
        return self

    def _title(self) -> str:
        """Return the run's ID and name for the log; a run made in Python is named by its model."""
        return str(self.id) if self.name == UNNAMED_RUN else f"{self.id} ({self.name})"

    def _is_current(self) -> bool:
        """Whether this context works on the run, or on none in particular."""
        recorders = visible_recorders()
        return not recorders or any(recorder is self for recorder in recorders)

    def _activate(self, row: RunRow) -> None:
        from qtorch.tracking.mlflow_active_run import activate_run

        self._deactivate = activate_run(self._uri, row)

    def _reopen(self) -> RunRow:
        run_id = self._run_id
        send_outbox(run_id, tracking_uri=self._uri)
        row = self._store.run(run_id)
        if row.is_deleted:
            raise TrackingError(f"run {run_id} is deleted; restore it before you resume it.")
        self._store.set_status(run_id, self.STATUS_R)
        self._load_row(row)
        self._attempt += 1
        self._store.log_batch(run_id, tags={ATTEMPT_TAG: str(self._attempt)})
        self._ledger = Ledger(self._store.history(run_id, row.metrics), row.params)
        return row

    def _log_provenance(self, is_resumed: bool) -> None:
        origin = {COMMAND_PARAM: command_line(), **qtorch_environment()}
        if is_resumed:  # params cannot change: log the differences of this attempt as tags
            new = {
                k: v for k, v in origin.items() if self._run_ledger.params.get(k) != v[:MAX_PARAM]
            }
            self.set_tags(**{f"qtorch.attempt_{self._attempt}.{k}": v for k, v in new.items()})
        else:
            self.log_params(**origin)
        with tempfile.TemporaryDirectory() as scratch:
            for name, text in git_changes().items():
                path = Path(scratch, self._attempt_name(name))
                path.write_text(text, encoding="utf-8")
                self._files.save_path(path, None)

    def _start_system_monitor(self, is_resumed: bool) -> None:
        from qtorch.tracking.mlflow_store import start_system_monitor

        self._stop_monitor = start_system_monitor(self._uri, self._run_id, is_resumed=is_resumed)

    def end_run(self, status: str = STATUS_FI) -> None:
        """Send all buffered entries and artifacts, then the status, and end the run.

        An unreachable store raises no error here. After QTORCH_TRACKING_PATIENCE seconds (30) the
        entries that could not be sent, including the status, stay in the outbox, and an error in
        the log names the file. Such a run is not FINISHED before they are sent: until then its
        status is RUNNING, here as in the store.
        """
        check_name("status", status, self.STATUSES, error=ArgumentError)
        run_id, end = self._run_id, now_ms()
        remove_running(self)
        stop_monitor, self._stop_monitor = self._stop_monitor, None
        deactivate, self._deactivate = self._deactivate, None
        for undo in (stop_monitor, deactivate):
            if undo is not None:
                undo()
        self._save_log(status)
        sender = self._sender or Sender(self._store, run_id, self._attempt)
        self._sender = None
        sender.enqueue([{"status": status, "time": end}])
        failure: BaseException | None = None
        try:
            failure = sender.close()
        except BaseException as error:  # a second Ctrl-C
            failure = error
        self.end_time, self.owner = format_local_time(end), 0
        is_delivered = self._close_journal(sender.journal, failure)
        self.status = status if is_delivered or status != self.STATUS_FI else self.STATUS_R
        if failure is not None and not isinstance(failure, TrackingError):
            raise failure

    def _save_log(self, status: str) -> None:
        """End the log of the run and upload it; an error here must not keep the run from ending."""
        run_log, self._run_log = self._run_log, None
        if run_log is None:
            return
        log.info("run %s ends: %s", self._title(), status)
        path = run_log.finish()
        if run_log.error:
            log.warning("the log of run %s is not complete: %s", self.id, run_log.error)
        if path is not None:
            self._upload_log(path)

    def _send_earlier_logs(self) -> None:
        """Upload the logs of earlier attempts whose process was killed on this machine."""
        if self._files.root is None:
            for path in sorted(self._files.log_folder.glob(f"*{RUN_LOG}")):
                if self._run_log is None or path != self._run_log.path:
                    self._upload_log(path)

    def _upload_log(self, path: Path) -> None:
        """Upload a log that is complete, and delete the file; in a local store it is in place."""
        if self._files.root is not None:
            return
        try:
            self._files.save_path(path, None)
            path.unlink()
        except (TrackingError, OSError) as error:
            log.warning("could not save the log of run %s: %s", self.id, error)

    def _attempt_name(self, name: str) -> str:
        """Return a file's name in this attempt at the run; a resumed run keeps the earlier ones."""
        return name if self._attempt == 1 else f"attempt_{self._attempt}_{name}"

    def _close_journal(self, journal: Journal, failure: BaseException | None) -> bool:
        """Close the outbox file; return whether it is empty, and if not, say so in the log."""
        if not journal.close():
            return True
        add_undelivered_run(self._run_id, self._uri)
        log.error(
            "run %s: %s Unsent entries were saved to %s; `qtorch tracking send` sends them.",
            self.id,
            failure or "the tracking store did not accept all entries.",
            journal.path,
        )
        return False

    # Logging

    @property
    def _run_ledger(self) -> Ledger:
        if self._ledger is None:
            row = self._store.run(self._run_id)
            self._ledger = Ledger(self._store.history(row.id, row.metrics), row.params)
        return self._ledger

    def _send(self, entries: list[Entry]) -> None:
        if entries:
            with self._open_sender() as sender:
                sender.enqueue(entries)

    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Log metrics of one step. Without `step`, each value of a key gets the next step from 0.

        Each (metric, step) is stored once: the same value is not sent again, and a different one
        is dropped with a warning. NaN and infinity are stored, with one warning.
        """
        self.log_batch(kwargs, step)

    def log_batch(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of one step as a mapping; returns immediately, a background thread sends."""
        time, entries = now_ms(), []
        for name, raw_value in metrics.items():
            key, value = clean_key(name), parse_metric_value(name, raw_value)
            new_step = self._run_ledger.record_metric(
                key, value, None if step is None else int(step)
            )
            if new_step is not None:
                if not math.isfinite(value):
                    warn_once(f"metric {key!r} is {value} at step {new_step} of run {self.id}")
                entries.append({"metric": key, "value": value, "time": time, "step": new_step})
        self._send(entries)

    def rename(self, name: str) -> None:
        """Give the run another name."""
        self._store.rename_run(self._run_id, name)
        self.name = name

    def log_input(
        self, name: str, digest: str, *, source: str, profile: str = "", context: str = ""
    ) -> None:
        """Log a dataset that the run used, for MLflow's dataset column.

        `digest`: a hash of its content. `context` says for what it was used.
        """
        self._store.log_input(self._run_id, name, digest, source, profile, context)

    def metric_history(self, key: str) -> dict[int, float]:
        """Return `{step: value}` of a metric, from this process and earlier attempts at the run."""
        return dict(self._run_ledger.metrics.get(clean_key(key), {}))

    def log_params(self, **kwargs: Any) -> None:
        """Log params as text, without secrets in URLs; each param is sent once.

        A different value for it is logged as the tag `qtorch.changed_param.<name>`, with a warning.
        A text of more than 6000 characters is truncated with a warning, and its full text becomes
        an artifact in `long_values`.
        """
        entries: list[Entry] = []
        for name, raw_value in kwargs.items():
            key, text = clean_key(name), redact_urls(str(raw_value))
            value = text[:MAX_PARAM]
            existing = self._run_ledger.record_param(key, value)
            if existing is None:
                if value != text:
                    self._save_long_text(key, text)
                entries.append({"param": key, "value": value})
            elif existing != value:
                log.warning(
                    "param %r already has the value %r; the new value %r is logged as a tag",
                    key,
                    existing,
                    value,
                )
                entries.append({"tag": (CHANGED_PREFIX + key)[:MAX_KEY], "value": text[:MAX_TAG]})
        self._send(entries)

    def _save_long_text(self, key: str, text: str) -> None:
        name = re.sub(r"[^\w\-.]", "_", key) + ".txt"
        log.warning(
            "%r has %d characters: truncated for MLflow, full text in %s/%s",
            key,
            len(text),
            TEXT_FOLDER,
            name,
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, name)
            path.write_text(text, encoding="utf-8")
            self._files.save_path(path, TEXT_FOLDER)

    def set_tags(self, **kwargs: Any) -> None:
        """Set tags as text, without secrets in URLs; a later value replaces an earlier one.

        Truncated to 8000 characters.
        """
        entries = []
        for name, raw_value in kwargs.items():
            key, text = clean_key(name), redact_urls(str(raw_value))
            if len(text) > MAX_TAG:
                self._save_long_text(key, text)
            entries.append({"tag": key, "value": text[:MAX_TAG]})
        self._send(entries)

    def delete_tags(self, *keys: str) -> None:
        """Delete tags; a missing tag is not an error."""
        self.flush()
        for key in keys:
            self._store.delete_tag(self._run_id, clean_key(key))

    def flush(self) -> bool:
        """Send all buffered entries; return True once the store has them, False on failure."""
        return self._sender is None or self._sender.flush()

    # Artifacts

    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Save objects by logical name (`**{"pred.pkl": pred}`), or a local file or folder content.

        `qtorch.tracking.artifacts` lists the file format of each kind of object.
        """
        if local_path is not None and kwargs:
            raise ArgumentError("save_objects takes either local_path or objects, not both.")
        if local_path is not None:
            self._files.save_path(Path(local_path), artifact_path, content=True)
        for name, value in kwargs.items():
            self._files.save(value, name, artifact_path)

    def load_object(self, name: str, unpickler: Callable[..., Any] | None = None) -> Any:
        """Load an object by its logical name; LoadObjectError lists the names that exist.

        Code in it must be trusted, unless the caller passes an `unpickler`.
        """
        value = self._files.load(name, unpickler)
        if callable(hook := getattr(value, "on_load", None)):
            hook(self)  # for objects that need to know the run that they come from
        return value

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Log a local file or folder unchanged, under its own name."""
        self._files.save_path(Path(local_path), artifact_path)

    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """Return the local path of a file, folder or object; a remote one is downloaded."""
        return self._files.fetch(path, dst_path)

    def list_artifacts(self, artifact_path: str | None = None) -> list[str]:
        """List a folder (not recursively): objects by logical name, other files by file name.

        An object appears as `pred.pkl`, not as its file `pred.pkl.parquet`; `download_artifact`
        accepts both names.
        """
        return self._files.names(artifact_path)

    def get_artifact_uri(self) -> str:
        """Return MLflow's URI of the run's artifacts; TrackingError before the run has started."""
        if self.artifact_uri is None:
            raise TrackingError(f"the recorder {self.name!r} has not been started.")
        return self.artifact_uri

    def get_local_dir(self) -> str:
        """Return the run's folder; for a remote store `runs/<id>` in qtorch's cache folder.

        Difference from Qlib, which raises for a remote store: checkpoints need a folder that
        persists.
        """
        folder = self._files.work_folder
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def checkpoint_dir(self) -> Path:
        """Return the folder `checkpoints` in a local store's artifacts, else in `get_local_dir()`.

        A later process on this machine that resumes the run gets the same folder.
        """
        folder = self._files.checkpoint_folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Reading from the store

    def _read_row(self) -> RunRow:
        self.flush()
        return self._store.run(self._run_id)

    def list_metrics(self) -> dict[str, float]:
        """Return the latest value of each metric."""
        return self._read_row().metrics

    def list_params(self) -> dict[str, str]:
        """Return all params as text."""
        return self._read_row().params

    def list_tags(self) -> dict[str, str]:
        """Return all tags, including MLflow's own."""
        return self._read_row().tags


MLflowRecorder = Recorder  # Qlib's name of the class that uses MLflow


def final_status(kind: type[BaseException] | None) -> str:
    """Return the status of a run whose block raised an exception of this class, or None.

    FINISHED for None, FAILED for an Exception, KILLED for Ctrl-C, SystemExit (Lightning turns
    Ctrl-C into it) and a generator that is closed.
    """
    if kind is None:
        return Recorder.STATUS_FI
    return Recorder.STATUS_FA if issubclass(kind, Exception) else Recorder.STATUS_K


def load_if_present(recorder: Recorder, name: str) -> Any:
    """Load an object by its logical name; None if the run does not have it."""
    try:
        return recorder.load_object(name)
    except LoadObjectError:
        return None


@contextmanager
def with_run_tags(tags: dict[str, str]) -> Iterator[None]:
    """Give every run that is created inside the block these tags from the start.

    The tags are part of the request that creates the run, so that even a process that is killed
    right afterwards leaves a run that can be identified.
    """
    token = _initial_tags.set({**_initial_tags.get(), **tags})
    try:
        yield
    finally:
        _initial_tags.reset(token)


def tag_lineage(run: Recorder, earlier: Recorder) -> None:
    """Tag `run` with the earlier run whose weights it starts from, and nest it under that run.

    A run that already has a parent keeps it. The earlier run is only read.
    """
    depth = int(earlier.list_tags().get(DEPTH_TAG, "0")) + 1
    tags = {FROM_TAG: earlier.id, DEPTH_TAG: str(depth)}
    if PARENT_TAG not in run.list_tags() and earlier.id != run.id:
        tags[PARENT_TAG] = earlier.id
    run.set_tags(**tags)


_lock = threading.Lock()
_running: list[Recorder] = []
_context_recorders: ContextVar[tuple[Recorder, ...] | None] = ContextVar(
    "qtorch_recorders", default=None
)


def current_recorder() -> Recorder | None:
    """Return the innermost running recorder of this context, or None."""
    recorders = visible_recorders()
    return recorders[-1] if recorders else None


def visible_recorders() -> list[Recorder]:
    """Return the running recorders that this context sees, the innermost last."""
    with _lock:
        own = _context_recorders.get()
        if own is None:
            return list(_running)
        return [r for r in own if any(r is running for running in _running)]


def add_running(recorder: Recorder) -> None:
    """Make a recorder that starts to run the current one, and end it at the latest at exit."""
    with _lock:
        if not any(recorder is running for running in _running):
            _running.append(recorder)
    own = tuple(r for r in _context_recorders.get() or () if r is not recorder)
    _context_recorders.set((*own, recorder))
    atexit.unregister(_end_running_recorders)
    atexit.register(_end_running_recorders)


def remove_running(recorder: Recorder) -> None:
    """Remove a recorder that has ended."""
    with _lock:
        _running[:] = [r for r in _running if r is not recorder]
    own = _context_recorders.get()
    if own is not None:
        _context_recorders.set(tuple(r for r in own if r is not recorder))


def running_recorders() -> list[Recorder]:
    """Return every running recorder of the process, whichever context started it."""
    with _lock:
        return list(_running)


def _end_running_recorders() -> None:
    """End the runs as FINISHED, or by the error that ended the program."""
    last = getattr(sys, "last_value", None)
    status = final_status(type(last) if last is not None else None)
    for recorder in reversed(running_recorders()):
        if recorder.owner == os.getpid():
            try:
                recorder.end_run(status)
            except QtorchError as error:
                log.error("could not end run %s: %s", recorder.id, error)
