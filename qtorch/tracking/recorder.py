"""One run on record: the interface that library code is given as `recorder`."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from qtorch.core.errors import ArgumentError, QtorchError, unknown_name
from qtorch.tracking.current import all_running

log = logging.getLogger(__name__)


class Recorder(ABC):
    """A run: its params, metrics, tags and artifacts. Answers to qlib/workflow/recorder.py.

    `start_time` and `end_time` are local times as text. A recorder that was created but never
    started is SCHEDULED and has no id.
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
        self.owner = 0  # the id of the process that started it and has not ended it

    @property
    def info(self) -> dict[str, Any]:
        """Class, id, name, experiment_id, start_time, end_time, status."""
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

    # A run

    @abstractmethod
    def start_run(self) -> Self:
        """Begin the run, or go on with it where it has an id; `with` ends it by how it left."""

    @abstractmethod
    def end_run(self, status: str = STATUS_FI) -> None:
        """Send what waits, set the status, end."""

    # What it logs

    @abstractmethod
    def log_params(self, **kwargs: Any) -> None:
        """Params; one that is there already is never sent again."""

    @abstractmethod
    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Metrics of one step, by keyword."""

    @abstractmethod
    def log_batch(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics of one step, by mapping; returns at once."""

    @abstractmethod
    def logged(self, key: str) -> dict[int, float]:
        """`{step: value}` of a metric: of earlier attempts at this run and of this process."""

    @abstractmethod
    def flush(self) -> bool:
        """Send what waits; True once the store has it, False where it does not take it now."""

    @abstractmethod
    def set_tags(self, **kwargs: Any) -> None:
        """Tags; a later value replaces an earlier one."""

    @abstractmethod
    def delete_tags(self, *keys: str) -> None:
        """Remove tags; one that is not there is no error."""

    # Artifacts

    @abstractmethod
    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Objects by logical name (`**{"pred.pkl": pred}`), or the content of a local path."""

    @abstractmethod
    def load_object(self, name: str) -> Any:
        """An object by its logical name; LoadObjectError says what there is."""

    @abstractmethod
    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """A local file or folder as it is."""

    @abstractmethod
    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """The local path of an artifact: where it lies if it is local, else a copy."""

    @abstractmethod
    def list_artifacts(self, artifact_path: str | None = None) -> list[str]:
        """What lies directly in a folder: stored objects by logical name, files by their own."""

    @abstractmethod
    def get_artifact_uri(self) -> str:
        """MLflow's URI of the run's artifacts."""

    @abstractmethod
    def get_local_dir(self) -> str:
        """A folder of this machine that belongs to the run and persists."""

    @abstractmethod
    def checkpoint_dir(self) -> Path:
        """Where training checkpoints of the run lie on this machine, made if need be."""

    # What the store holds

    @abstractmethod
    def list_metrics(self) -> dict[str, float]:
        """The newest value of each metric."""

    @abstractmethod
    def list_params(self) -> dict[str, str]:
        """All params, as text."""

    @abstractmethod
    def list_tags(self) -> dict[str, str]:
        """All tags, MLflow's own too."""


def final_status(kind: type[BaseException] | None) -> str:
    """How a run ended, by what its block raised.

    FINISHED for nothing, FAILED for an exception, KILLED for Ctrl-C, SystemExit (Lightning turns
    Ctrl-C into it) and a generator that is closed.
    """
    if kind is None:
        return Recorder.STATUS_FI
    return Recorder.STATUS_FA if issubclass(kind, Exception) else Recorder.STATUS_K


def check_status(status: str) -> str:
    """ArgumentError, with the nearest name, for a status that there is not."""
    if status not in Recorder.STATUSES:
        raise ArgumentError(unknown_name("status", str(status), Recorder.STATUSES))
    return status


def end_at_exit() -> None:
    """Have the runs of this process that nobody ends end with it (the first call registers)."""
    atexit.unregister(_end_what_runs)
    atexit.register(_end_what_runs)


def _end_what_runs() -> None:
    """FINISHED, or as the error that ended the program says."""
    last = getattr(sys, "last_value", None)
    status = final_status(type(last) if last is not None else None)
    for recorder in reversed(all_running()):
        if recorder.owner == os.getpid():
            try:
                recorder.end_run(status)
            except QtorchError as error:
                log.error("run %s was not ended: %s", recorder.id, error)
