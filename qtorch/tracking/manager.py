"""Experiment managers: find, create, start and end the experiments of a tracking store."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pandas as pd

from qtorch.core.errors import ArgumentError, TrackingError, unknown_name
from qtorch.tracking.current import visible_recorders
from qtorch.tracking.errors import AlreadyInStoreError, NotInStoreError
from qtorch.tracking.experiment import Experiment, MLflowExperiment, Names, runs_table
from qtorch.tracking.locations import default_uri, resolve_uri
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.recorder import Recorder

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore
    from qtorch.tracking.rows import ExperimentRow

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "Experiment"  # Qlib's


class ExpManager(ABC):
    """Finds, creates, starts and ends experiments. Corresponds to qlib/workflow/expm.py.

    Difference from Qlib: runs can be nested, and threads do not see each other's runs.
    """

    def __init__(
        self, uri: str | None = None, default_exp_name: str | None = DEFAULT_EXPERIMENT
    ) -> None:
        self._uri = None if uri is None else resolve_uri(uri)
        self._local_uri: ContextVar[str | None] = ContextVar("qtorch_tracking_uri", default=None)
        self._default_exp_name = default_exp_name or DEFAULT_EXPERIMENT

    def __repr__(self) -> str:
        return f"{type(self).__name__}(uri={self.uri!r})"

    @property
    def default_uri(self) -> str:
        """The URI used when no run is active: the one set here, in `qtorch.init` or in the
        environment, else `mlruns/mlflow.db` in the working folder."""
        return self._local_uri.get() or self._uri or default_uri()

    @default_uri.setter
    def default_uri(self, uri: str | None) -> None:
        self._uri = None if uri is None else resolve_uri(uri)

    @contextmanager
    def uri_context(self, uri: str) -> Iterator[None]:
        """Use another default URI inside a `with` block, in this context (thread) only."""
        token = self._local_uri.set(resolve_uri(uri))
        try:
            yield
        finally:
            self._local_uri.reset(token)

    @property
    @abstractmethod
    def uri(self) -> str:
        """The current tracking URI: the active run's, else `default_uri`."""

    @property
    @abstractmethod
    def active_experiment(self) -> Experiment | None:
        """Return the experiment of the innermost running recorder of this context."""

    @abstractmethod
    def start_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        uri: str | None = None,
        resume: bool = False,
    ) -> Experiment:
        """Start a run in an experiment, which is created if it does not exist."""

    @abstractmethod
    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the innermost running recorder of this context if there is one."""

    @abstractmethod
    def create_exp(self, experiment_name: str | None = None) -> Experiment:
        """Create an experiment; AlreadyInStoreError if the name exists."""

    @abstractmethod
    def get_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> Experiment:
        """Return the experiment with an ID or name, by default the active or the default one."""

    @abstractmethod
    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment as deleted."""

    @abstractmethod
    def list_experiments(self) -> dict[str, Experiment]:
        """Return `{name: experiment}` of all experiments that are not deleted."""

    @abstractmethod
    def search_records(
        self,
        experiment_ids: Names = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Names = None,
    ) -> pd.DataFrame:
        """Return runs as a table with one row per run."""


class MLflowExpManager(ExpManager):
    """The MLflow implementation of ExpManager."""

    @property
    def uri(self) -> str:
        """The current tracking URI: the active run's, else `default_uri`."""
        active = self._active_recorder
        return active.uri if active else self.default_uri

    @property
    def _active_recorder(self) -> MLflowRecorder | None:
        for recorder in reversed(visible_recorders()):
            if isinstance(recorder, MLflowRecorder):
                return recorder
        return None

    @property
    def active_experiment(self) -> MLflowExperiment | None:
        """Return the experiment of the innermost running recorder of this context."""
        active = self._active_recorder
        if active is None:
            return None
        name = active.experiment_name
        if name is None:
            row = self._store().experiment(id=active.experiment_id)
            name = row.name if row else ""
        return MLflowExperiment(active.experiment_id, name, active.uri)

    def _store(self, uri: str | None = None) -> MLflowStore:
        from qtorch.tracking.mlflow_store import open_store

        return open_store(uri or self.uri)

    def start_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        uri: str | None = None,
        resume: bool = False,
    ) -> MLflowExperiment:
        """Start a run in an experiment, which is created if it does not exist.

        If `recorder_id` is given without an experiment, the run's own experiment is used.
        """
        store = self._store(uri or self.default_uri)
        if resume and recorder_id and experiment_id is None and experiment_name is None:
            experiment_id = store.run(recorder_id).experiment_id
        if experiment_id is None and experiment_name is None:
            experiment_name = self._default_exp_name
        experiment = self._get_or_create(store, experiment_id, experiment_name)
        experiment.start(recorder_id=recorder_id, recorder_name=recorder_name, resume=resume)
        return experiment

    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the innermost running recorder of this context if there is one."""
        active = self._active_recorder
        if active is not None:
            active.end_run(recorder_status)

    def create_exp(self, experiment_name: str | None = None) -> MLflowExperiment:
        """Create an experiment; AlreadyInStoreError if the name exists."""
        store = self._store()
        row = store.create_experiment(experiment_name or self._default_exp_name)
        return MLflowExperiment(row.id, row.name, store.uri)

    def get_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> MLflowExperiment:
        """Return the experiment with an ID or name, by default the active or the default one.

        If there is none with the name, `create` creates it; NotInStoreError without `create`.
        `start` starts a run in the experiment if none is active.
        """
        active = self.active_experiment
        if experiment_id is None and experiment_name is None:
            if active is not None:
                return active
            experiment_name = self._default_exp_name
        store = self._store()
        if create:
            experiment = self._get_or_create(store, experiment_id, experiment_name)
        else:
            experiment = self._get_existing(store, experiment_id, experiment_name)
        if start and active is None:
            experiment.start()
        return experiment

    def recorder(self, recorder_id: str) -> MLflowRecorder:
        """Return the run with an ID from any experiment; NotInStoreError if there is none."""
        row = self._store().run(recorder_id)
        experiment = self.get_exp(experiment_id=row.experiment_id, create=False)
        return experiment.get_recorder(recorder_id, create=False)

    def _find_experiment(
        self, store: MLflowStore, id: str | None, name: str | None
    ) -> ExperimentRow | None:
        row = store.experiment(id=id, name=name)
        if row is not None and row.is_deleted:
            raise NotInStoreError(
                f"the experiment {row.name!r} (ID {row.id}) is deleted; restore it with `mlflow "
                f"experiments restore -x {row.id}` or use another name."
            )
        return row

    def _get_existing(
        self, store: MLflowStore, id: str | None, name: str | None
    ) -> MLflowExperiment:
        row = self._find_experiment(store, id, name)
        if row is None:
            existing = store.experiments()
            valid = [e.name for e in existing] if id is None else [e.id for e in existing]
            raise NotInStoreError(unknown_name("experiment", str(id or name), valid))
        return MLflowExperiment(row.id, row.name, store.uri)

    def _get_or_create(
        self, store: MLflowStore, id: str | None, name: str | None
    ) -> MLflowExperiment:
        if id is not None:
            return self._get_existing(store, id, None)
        row = self._find_experiment(store, None, name)
        if row is None:
            try:
                row = store.create_experiment(name or self._default_exp_name)
                log.info("created experiment %r", row.name)
            except AlreadyInStoreError:  # another process created it first
                row = self._find_experiment(store, None, name)
        if row is None:
            raise TrackingError(f"the experiment {name!r} could be neither read nor created.")
        return MLflowExperiment(row.id, row.name, store.uri)

    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment as deleted; NotInStoreError if there is none."""
        if experiment_id is None and experiment_name is None:
            raise ArgumentError("delete_exp needs an experiment_id or an experiment_name.")
        store = self._store()
        store.delete_experiment(self._get_existing(store, experiment_id, experiment_name).id)

    def list_experiments(self) -> dict[str, Experiment]:
        """Return `{name: experiment}` of all experiments that are not deleted."""
        store = self._store()
        return {e.name: MLflowExperiment(e.id, e.name, store.uri) for e in store.experiments()}

    def search_records(
        self,
        experiment_ids: Names = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Names = None,
    ) -> pd.DataFrame:
        """Return runs as a table with one row per run; of all experiments by default.

        `filter_string` and `order_by` use MLflow's syntax (`metrics.IC > 0.02`). `run_view_type`
        1 selects the runs that are not deleted, 2 the deleted ones, 3 both. The columns are those
        of `qtorch.tracking.experiment.runs_table`.
        Difference from Qlib: this returns the DataFrame that Qlib documents, not a list of runs.
        """
        store = self._store()
        if isinstance(experiment_ids, str):
            experiment_ids = [experiment_ids]
        ids: Sequence[str] = (
            [e.id for e in store.experiments()] if experiment_ids is None else experiment_ids
        )
        rows = store.runs(
            ids,
            filter_string=filter_string or "",
            run_view_type=run_view_type or 1,
            max_results=100_000 if max_results is None else max_results,
            order_by=order_by,
        )
        return runs_table(rows)


#: The manager of this process, shared with `R`, so that `R.set_uri` and `R.uri_context` apply to
#: all code that looks up a run.
MANAGER = MLflowExpManager()
