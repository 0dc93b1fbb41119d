"""Experiments: named collections of runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from qtorch.core.errors import ArgumentError, check_name, unknown_name_message
from qtorch.tracking.locations import resolve_uri
from qtorch.tracking.recorder import UNNAMED_RUN, Recorder, visible_recorders
from qtorch.tracking.store_types import NotInStoreError, RunRow

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)


class Experiment:
    """An experiment of a tracking store. Corresponds to qlib/workflow/exp.py.

    Difference from Qlib: MLflow is the only backend, so that there is no separate interface.
    """

    RT_D = "dict"
    RT_L = "list"
    UNLIMITED = 50_000
    default_recorder_name = UNNAMED_RUN

    def __init__(self, id: str, name: str, uri: str) -> None:
        self.id = id
        self.name = name
        self._uri = resolve_uri(uri)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, name={self.name!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Experiment):
            return NotImplemented
        return (self.id, self._uri) == (other.id, other._uri)

    def __hash__(self) -> int:
        return hash((self.id, self._uri))

    @property
    def _store(self) -> MLflowStore:
        from qtorch.tracking.mlflow_store import open_store

        return open_store(self._uri)

    def _running_recorders(self) -> list[Recorder]:
        """Return the running recorders of this experiment in this context, the innermost first."""
        return [
            recorder
            for recorder in reversed(visible_recorders())
            if (recorder.experiment_id, recorder.uri) == (self.id, self._uri)
        ]

    @property
    def active_recorder(self) -> Recorder | None:
        """The innermost running recorder of this experiment in this context."""
        return next(iter(self._running_recorders()), None)

    @property
    def info(self) -> dict[str, object]:
        """Class, id, name, active_recorder and recorders (both as IDs)."""
        active = self.active_recorder
        return {
            "class": "Experiment",
            "id": self.id,
            "name": self.name,
            "active_recorder": active.id if active else None,
            "recorders": list(self.list_recorders()),
        }

    def start(
        self,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        resume: bool = False,
    ) -> Recorder:
        """Start a new run, or with `resume` resume the run with the given ID or name.

        If no run has the name, a new one is started even with `resume` (as in Qlib, so that a
        program can be run again unchanged). If no run has the ID, NotInStoreError is raised.
        """
        name = recorder_name or self.default_recorder_name
        if not resume:
            if recorder_id is not None:
                raise ArgumentError(
                    f"recorder_id={recorder_id!r} is the ID of an existing run: pass resume=True "
                    "to resume it, or omit the ID to start a new run."
                )
            return self.create_recorder(name).start_run()
        if recorder_id is not None:
            return self._find_by_id(recorder_id).start_run()
        return (self._find_by_name(name) or self.create_recorder(name)).start_run()

    def end(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the active recorder if there is one."""
        if self.active_recorder is not None:
            self.active_recorder.end_run(recorder_status)

    def create_recorder(self, recorder_name: str | None = None) -> Recorder:
        """Create a recorder that is not started yet."""
        name = recorder_name or self.default_recorder_name
        return Recorder(self.id, self._uri, name, experiment_name=self.name)

    def get_recorder(
        self,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> Recorder:
        """Return the recorder with an ID or name (the newest of a name), by default the active one.

        If there is none with the name, `create` creates it, and `start` starts the created one.
        NotInStoreError without `create`.
        """
        if recorder_id is not None:
            return self._find_by_id(recorder_id)
        if recorder_name is None and self.active_recorder is not None:
            return self.active_recorder
        name = recorder_name or self.default_recorder_name
        recorder = self._find_by_name(name)
        if recorder is not None:
            return recorder
        if not create:
            names = {str(r.name) for r in self.list_recorders("list")}
            reason = unknown_name_message("recorder", name, names)
            raise NotInStoreError(f"experiment {self.name!r}: {reason}")
        new_recorder = self.create_recorder(name)
        return new_recorder.start_run() if start else new_recorder

    def _find_by_id(self, recorder_id: str) -> Recorder:
        for recorder in visible_recorders():
            if recorder.id == recorder_id:
                return recorder
        row = self._store.run(recorder_id)
        if row.experiment_id != self.id:
            raise NotInStoreError(
                f"run {recorder_id} is not in experiment {self.name!r} (ID {self.id}) but in the "
                f"experiment with ID {row.experiment_id}."
            )
        return self._build_recorder(row)

    def _find_by_name(self, name: str) -> Recorder | None:
        for recorder in self._running_recorders():
            if recorder.name == name:
                return recorder
        matching_rows = [r for r in self._store.runs([self.id]) if r.name == name]
        if len(matching_rows) > 1:
            log.info("%d runs have the name %r; using the newest", len(matching_rows), name)
        return self._build_recorder(matching_rows[0]) if matching_rows else None

    def _build_recorder(self, row: RunRow) -> Recorder:
        return Recorder(self.id, self._uri, mlflow_run=row, experiment_name=self.name)

    def delete_recorder(
        self, recorder_id: str | None = None, recorder_name: str | None = None
    ) -> None:
        """Mark a run as deleted, by ID or the newest of a name; NotInStoreError if none."""
        if recorder_id is None and recorder_name is None:
            raise ArgumentError("delete_recorder needs a recorder_id or a recorder_name.")
        recorder = self.get_recorder(recorder_id, recorder_name, create=False)
        self._store.delete_run(str(recorder.id))

    def search_records(self, **options: Any) -> pd.DataFrame:
        """Return the runs of this experiment as a table; the options are those of R's method."""
        return runs_table(self._store.runs([self.id], **options))

    def list_recorders(
        self,
        rtype: Literal["dict", "list"] = "dict",
        max_results: int = UNLIMITED,
        status: str | None = None,
        filter_string: str = "",
    ) -> Any:
        """Return the runs (of a status, if given), newest first, as `{id: recorder}` or a list."""
        check_name("rtype", rtype, (self.RT_D, self.RT_L), error=ArgumentError)
        rows = self._store.runs([self.id], filter_string=filter_string, max_results=max_results)
        recorders = [self._build_recorder(row) for row in rows if status in (None, row.status)]
        return {str(r.id): r for r in recorders} if rtype == self.RT_D else recorders


MLflowExperiment = Experiment  # Qlib's name of the class that uses MLflow


def runs_table(rows: Sequence[RunRow]) -> pd.DataFrame:
    """Build a table with one row per run.

    Columns: run_id, experiment_id, status, artifact_uri, start_time and end_time (UTC), and one
    for each metric, param and tag: `metrics.*` (NaN if a run has none), `params.*` and `tags.*`
    (None)."""
    columns = {
        "run_id": pd.Series([r.id for r in rows], dtype=object),
        "experiment_id": pd.Series([r.experiment_id for r in rows], dtype=object),
        "status": pd.Series([r.status for r in rows], dtype=object),
        "artifact_uri": pd.Series([r.artifact_uri for r in rows], dtype=object),
        "start_time": _to_datetimes([r.start_time for r in rows]),
        "end_time": _to_datetimes([r.end_time for r in rows]),
    }
    for key in sorted({k for r in rows for k in r.metrics}):
        values = [r.metrics.get(key, float("nan")) for r in rows]
        columns[f"metrics.{key}"] = pd.Series(values, dtype=float)
    for kind in ("params", "tags"):
        mappings: list[dict[str, str]] = [getattr(r, kind) for r in rows]
        for key in sorted({k for mapping in mappings for k in mapping}):
            texts = [mapping.get(key) for mapping in mappings]
            columns[f"{kind}.{key}"] = pd.Series(texts, dtype=object)
    return pd.DataFrame(columns)


def _to_datetimes(milliseconds: list[int | None]) -> pd.Series:
    return pd.to_datetime(pd.Series(milliseconds, dtype="Int64"), unit="ms", utc=True)
