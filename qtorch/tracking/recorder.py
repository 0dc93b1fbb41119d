"""The Recorder interface, and the recorders that are running in this process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from abc import ABC, abstractmethod
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, Self

from qtorch.core.errors import ArgumentError, LoadObjectError, QtorchError, unknown_name_message

log = logging.getLogger(__name__)


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

    def set_tags(self, **kwargs: Any) -> None:
        """Set tags of the run."""


class TrainingRecorder(MetricRecorder, Protocol):
    """What a fit uses of a recorder: metrics, tags, and a folder for checkpoints."""

    def checkpoint_dir(self) -> Path:
        """Return the run's checkpoint folder on this machine."""


class Recorder(ABC):
    """One run: its params, metrics, tags and artifacts. Corresponds to qlib/workflow/recorder.py.

    `start_time` and `end_time` are local times as text. A recorder that was created but not yet
    started is SCHEDULED and has no ID.
    """

    STATUS_S = "SCHEDULED"
    STATUS_R = "RUNNING"
    STATUS_FI = "FINISHED"
    STATUS_FA = "FAILED"
    STATUS_K = "KILLED"
    STATUSES = (STATUS_S, STATUS_R, STATUS_FI, STATUS_FA, STATUS_K)

    def __init__(self, experiment_id: str, name: str | None) -> None:
        self.id: str | None = None
        self.name = name
        self.experiment_id = experiment_id
        self.start_time: str | None = None
        self.end_time: str | None = None
        self.status = self.STATUS_S
        self.owner = 0  # ID of the process in which the run is active, 0 if in none

    @property
    def uri(self) -> str | None:
        """The URI of the tracking store, or None if the recorder has none."""
        return None

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

    # Start and end

    @abstractmethod
    def start_run(self) -> Self:
        """Start the run, or resume it if it has an ID; a `with` block then ends it."""

    @abstractmethod
    def end_run(self, status: str = STATUS_FI) -> None:
        """Send all buffered entries, set the status and end the run."""

    # Logging

    @abstractmethod
    def log_params(self, **kwargs: Any) -> None:
        """Log params; a param that the run already has is never sent again."""

    @abstractmethod
    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Log metrics of one step as keyword arguments."""

    @abstractmethod
    def log_batch(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics of one step as a mapping; returns immediately."""

    @abstractmethod
    def metric_history(self, key: str) -> dict[int, float]:
        """Return `{step: value}` of a metric, from this process and earlier attempts at the run."""

    @abstractmethod
    def flush(self) -> bool:
        """Send all buffered entries; return True once the store has them, False on failure."""

    @abstractmethod
    def set_tags(self, **kwargs: Any) -> None:
        """Set tags; a later value replaces an earlier one."""

    @abstractmethod
    def delete_tags(self, *keys: str) -> None:
        """Delete tags; a missing tag is not an error."""

    # Artifacts

    @abstractmethod
    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Save objects by logical name (`**{"pred.pkl": pred}`), or the content of a local path."""

    @abstractmethod
    def load_object(self, name: str) -> Any:
        """Load an object by its logical name; LoadObjectError lists the names that exist."""

    @abstractmethod
    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Log a local file or folder unchanged."""

    @abstractmethod
    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """Return the local path of an artifact: its own path if it is local, else a copy."""

    @abstractmethod
    def list_artifacts(self, artifact_path: str | None = None) -> list[str]:
        """List a folder (not recursively): objects by logical name, other files by file name."""

    @abstractmethod
    def get_artifact_uri(self) -> str:
        """Return MLflow's URI of the run's artifacts."""

    @abstractmethod
    def get_local_dir(self) -> str:
        """Return a persistent folder on this machine that belongs to the run."""

    @abstractmethod
    def checkpoint_dir(self) -> Path:
        """Return the run's checkpoint folder on this machine, created if missing."""

    # Reading from the store

    @abstractmethod
    def list_metrics(self) -> dict[str, float]:
        """Return the latest value of each metric."""

    @abstractmethod
    def list_params(self) -> dict[str, str]:
        """Return all params as text."""

    @abstractmethod
    def list_tags(self) -> dict[str, str]:
        """Return all tags, including MLflow's own."""


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


def check_status(status: str) -> str:
    """Return the status; raise ArgumentError with the nearest valid name for an unknown one."""
    if status not in Recorder.STATUSES:
        raise ArgumentError(unknown_name_message("status", str(status), Recorder.STATUSES))
    return status


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
