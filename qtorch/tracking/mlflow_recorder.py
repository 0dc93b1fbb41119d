"""The Recorder on MLflow."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qtorch.core.errors import ArgumentError, TrackingError
from qtorch.tracking import outbox
from qtorch.tracking.current import make_current, make_past
from qtorch.tracking.ledger import Ledger
from qtorch.tracking.limits import (
    MAX_KEY,
    MAX_PARAM,
    MAX_TAG,
    clean_key,
    local_time,
    now,
    number,
    say_once,
)
from qtorch.tracking.lineage import birth_tags, told_of
from qtorch.tracking.locations import resolve_uri
from qtorch.tracking.provenance import (
    command_line,
    environment,
    source_tags,
    uncommitted_changes,
)
from qtorch.tracking.recorder import Recorder, check_status, end_at_exit
from qtorch.tracking.rows import RunRow
from qtorch.tracking.run_files import RunFiles
from qtorch.tracking.sender import Sender

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

COMMAND_PARAM = "cmd-sys.argv"  # Qlib's name
TEXT_FOLDER = "long_values"
CHANGED_PREFIX = "qtorch.changed_param."


class MLflowRecorder(Recorder):
    """A run of an MLflow store, by client alone: MLflow's active run is not touched.

    Logging is buffered, sent from a thread and safe on disk meanwhile (`outbox`). `client` is
    MLflow's own for what is not here.
    """

    def __init__(
        self,
        experiment_id: str,
        uri: str,
        name: str | None = None,
        mlflow_run: RunRow | None = None,
        *,
        experiment_name: str | None = None,
    ) -> None:
        super().__init__(experiment_id, name)
        self.experiment_name = experiment_name
        self._uri = resolve_uri(uri)
        self.artifact_uri: str | None = None  # known once it has started
        self.deleted = False
        self._ledger: Ledger | None = None
        self._sender: Sender | None = None
        self._files_: RunFiles | None = None
        self._stop_monitor: Callable[[], None] | None = None
        self._attempt = 1
        if mlflow_run is not None:
            self._take(mlflow_run)

    def _take(self, run: RunRow) -> None:
        self.id, self.name, self.status = run.id, run.name, run.status
        self.experiment_id = run.experiment_id
        self.start_time, self.end_time = local_time(run.start_time), local_time(run.end_time)
        self.artifact_uri, self.deleted = run.artifact_uri, run.deleted
        self._attempt = int(run.tags.get(outbox.ATTEMPT_TAG, "1"))

    def __getstate__(self) -> dict[str, Any]:
        live = ("_ledger", "_sender", "_files_", "_stop_monitor")
        return {**self.__dict__, **dict.fromkeys(live), "owner": 0}

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
        from qtorch.tracking.mlflow_store import store_at

        return store_at(self._uri)

    @property
    def _run_id(self) -> str:
        if self.id is None:
            raise TrackingError(
                f"the recorder {self.name!r} has not been started: call start_run(), or use "
                "R.start(...)."
            )
        return self.id

    @property
    def _files(self) -> RunFiles:
        if self._files_ is None:
            self._files_ = RunFiles(
                lambda: self._store, self._run_id, self.get_artifact_uri(), self._open_journal
            )
        return self._files_

    def _open_journal(self) -> outbox.Journal:
        if self._sender is not None:
            return self._sender.journal
        return outbox.Journal(self._run_id, self._uri, self._attempt)

    # A run

    def start_run(self) -> Self:
        """Begin the run, or go on with it where it has an id.

        A run that goes on first delivers what an earlier attempt left in the outbox, and reads
        what it holds, so that nothing is sent twice. Raises TrackingError where nothing answers.
        """
        if self._sender is not None:
            raise TrackingError(f"the run {self.id} is running already.")
        resumed = self.id is not None
        if resumed:
            self._reopen()
        else:
            tags = {**source_tags(), **birth_tags(), outbox.ATTEMPT_TAG: "1"}
            self._take(self._store.create_run(self.experiment_id, self.name, tags, now()))
            self._ledger = Ledger()
        self.status, self.end_time = self.STATUS_R, None
        self._sender = Sender(self._store, self._run_id, self._attempt)
        self.owner = os.getpid()
        make_current(self)
        end_at_exit()
        try:
            self._log_origin(resumed)
            self._start_monitor(resumed)
        except BaseException:
            self.end_run(self.STATUS_FA)
            raise
        log.info("run %s (%s) is running", self.id, self.name)
        return self

    def _reopen(self) -> None:
        run_id = self._run_id
        outbox.send(run_id, tracking_uri=self._uri)
        row = self._store.run(run_id)
        if row.deleted:
            raise TrackingError(f"the run {run_id} is deleted; restore it before resuming it.")
        self._store.set_status(run_id, self.STATUS_R)
        self._take(row)
        self._attempt += 1
        self._store.log_batch(run_id, tags={outbox.ATTEMPT_TAG: str(self._attempt)})
        self._ledger = Ledger(self._store.history(run_id, row.metrics), row.params)

    def _log_origin(self, resumed: bool) -> None:
        origin = {COMMAND_PARAM: command_line(), **environment()}
        if resumed:  # params stand; what is new about this attempt is a tag
            new = {k: v for k, v in origin.items() if self._known.params.get(k) != v[:MAX_PARAM]}
            self.set_tags(**{f"qtorch.attempt_{self._attempt}.{k}": v for k, v in new.items()})
        else:
            self.log_params(**origin)
        with tempfile.TemporaryDirectory() as scratch:
            for name, text in uncommitted_changes().items():
                path = Path(scratch, f"attempt_{self._attempt}_{name}" if resumed else name)
                path.write_text(text, encoding="utf-8")
                self._files.put(path, None)

    def _start_monitor(self, resumed: bool) -> None:
        from qtorch.tracking.mlflow_store import start_monitor

        self._stop_monitor = start_monitor(self._uri, self._run_id, resumed=resumed)

    def end_run(self, status: str = Recorder.STATUS_FI) -> None:
        """Send what waits, set the status, end. A store that is away does not raise here.

        After QTORCH_TRACKING_PATIENCE seconds (30) what it did not take, the status too, stays in
        the outbox, and an error in the log names the file.
        """
        check_status(status)
        run_id, end = self._run_id, now()
        make_past(self)
        stop, self._stop_monitor = self._stop_monitor, None
        if stop is not None:
            stop()
        sender, self._sender = self._sender, None
        journal = sender.journal if sender else outbox.Journal(run_id, self._uri, self._attempt)
        failure: BaseException | None = None
        try:
            failure = sender.close() if sender else None
            if failure is None:
                self._store.set_status(run_id, status, end)
        except BaseException as error:  # of a second Ctrl-C too: the status must not get lost
            failure = error
        if failure is not None:
            journal.append([{"status": status, "time": end}])
        self.status, self.end_time, self.owner = status, local_time(end), 0
        if journal.close():
            log.error(
                "run %s: %s What was not delivered is kept in %s; `qtorch tracking send` sends it.",
                run_id,
                failure or "the tracking store did not take everything.",
                journal.path,
            )
        if failure is not None and not isinstance(failure, TrackingError):
            raise failure

    # What it logs

    @property
    def _known(self) -> Ledger:
        if self._ledger is None:
            row = self._store.run(self._run_id)
            self._ledger = Ledger(self._store.history(row.id, row.metrics), row.params)
        return self._ledger

    def _send(self, entries: list[outbox.Entry]) -> None:
        if self._sender is not None:
            self._sender.put(entries)
        elif entries:
            sender = Sender(self._store, self._run_id, self._attempt)
            sender.put(entries)
            failure = sender.close()
            if sender.journal.close():
                log.error("run %s: %s It is kept in %s", self.id, failure, sender.journal.path)

    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Metrics of one step. Without a step each value of a key gets the next one (0, 1, ...).

        Each (metric, step) stands once: a value that is there already is not sent again, another
        one neither, with a warning. NaN and infinity are stored, and said once.
        """
        self.log_batch(kwargs, step)

    def log_batch(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """`log_metrics` by mapping; returns at once, a thread sends."""
        time, entries = now(), []
        for name, given in metrics.items():
            key, value = clean_key(name), number(name, given)
            admitted = self._known.admit_metric(key, value, None if step is None else int(step))
            if admitted is not None:
                if not math.isfinite(value):
                    say_once(f"metric {key!r} is {value} at step {admitted} of run {self.id}")
                entries.append({"metric": key, "value": value, "time": time, "step": admitted})
        self._send(entries)

    def logged(self, key: str) -> dict[int, float]:
        """`{step: value}` of a metric: of earlier attempts at this run and of this process."""
        return dict(self._known.metrics.get(clean_key(key), {}))

    def log_params(self, **kwargs: Any) -> None:
        """Params as text; one that is there already is never sent again.

        Another value for it is a warning and a tag `qtorch.changed_param.<name>`. A text of over
        6000 characters is cut with a warning and kept whole as an artifact in `long_values`.
        """
        entries: list[outbox.Entry] = []
        for name, given in kwargs.items():
            key, full = clean_key(name), str(given)
            value = full[:MAX_PARAM]
            stands = self._known.admit_param(key, value)
            if stands is None:
                if value != full:
                    self._keep_long(key, full)
                entries.append({"param": key, "value": value})
            elif stands != value:
                log.warning("param %r stands as %r; the new value %r is a tag", key, stands, value)
                entries.append({"tag": (CHANGED_PREFIX + key)[:MAX_KEY], "value": full[:MAX_TAG]})
        self._send(entries)

    def _keep_long(self, key: str, text: str) -> None:
        name = re.sub(r"[^\w\-.]", "_", key) + ".txt"
        log.warning(
            "%r has %d characters: cut for MLflow, whole in %s/%s",
            key,
            len(text),
            TEXT_FOLDER,
            name,
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, name)
            path.write_text(text, encoding="utf-8")
            self._files.put(path, TEXT_FOLDER)

    def set_tags(self, **kwargs: Any) -> None:
        """Tags as text; a later value replaces an earlier one, a long one (8000) is cut."""
        entries = []
        for name, given in kwargs.items():
            key, text = clean_key(name), str(given)
            if len(text) > MAX_TAG:
                self._keep_long(key, text)
            entries.append({"tag": key, "value": text[:MAX_TAG]})
        self._send(entries)

    def delete_tags(self, *keys: str) -> None:
        """Remove tags; one that is not there is no error."""
        self.flush()
        for key in keys:
            self._store.delete_tag(self._run_id, clean_key(key))

    def flush(self) -> bool:
        """Send what waits; True once the store has it, False where it does not take it now."""
        return self._sender is None or self._sender.flush()

    # Artifacts

    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Objects by logical name (`**{"pred.pkl": pred}`), or a local file or a folder's content.

        What each kind of object is stored as: `qtorch.tracking.artifacts`.
        """
        if local_path is not None and kwargs:
            raise ArgumentError("give save_objects either local_path or objects, not both.")
        if local_path is not None:
            self._files.put(Path(local_path), artifact_path, content=True)
        for name, value in kwargs.items():
            self._files.save(value, name, artifact_path)

    def load_object(self, name: str, unpickler: Callable[..., Any] | None = None) -> Any:
        """An object by its logical name; LoadObjectError says what there is.

        What is no data is rebuilt under the trust rule, or by an `unpickler` of the caller's own.
        """
        return told_of(self, self._files.load(name, unpickler))

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """A local file or folder as it is, under its own name."""
        self._files.put(Path(local_path), artifact_path)

    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """A local path of a file, folder or object: where it lies if it is local, else a copy."""
        return self._files.fetch(path, dst_path)

    def list_artifacts(self, artifact_path: str | None = None) -> list[str]:
        """What lies directly in a folder: stored objects by logical name, files by their own.

        `pred.pkl`, not the file `pred.pkl.parquet` that holds it; both name it to
        `download_artifact`.
        """
        return self._files.names(artifact_path)

    def get_artifact_uri(self) -> str:
        """MLflow's URI of the run's artifacts; TrackingError before the start."""
        if self.artifact_uri is None:
            raise TrackingError(f"the recorder {self.name!r} has not been started.")
        return self.artifact_uri

    def get_local_dir(self) -> str:
        """The run's folder; for a store elsewhere `runs/<id>` in qtorch's cache folder.

        Difference from Qlib, which refuses the latter: checkpoints need a place that persists.
        """
        folder = self._files.work_folder
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def checkpoint_dir(self) -> Path:
        """`checkpoints` among the artifacts of a local store, else in `get_local_dir()`.

        The same folder for the same run in a later process of this machine (a resume).
        """
        folder = self._files.checkpoint_folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # What the store holds

    def _row(self) -> RunRow:
        self.flush()
        return self._store.run(self._run_id)

    def list_metrics(self) -> dict[str, float]:
        """The newest value of each metric."""
        return self._row().metrics

    def list_params(self) -> dict[str, str]:
        """All params, as text."""
        return self._row().params

    def list_tags(self) -> dict[str, str]:
        """All tags, MLflow's own too."""
        return self._row().tags
