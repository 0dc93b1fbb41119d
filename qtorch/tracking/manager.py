"""The experiments of a tracking store, and which of them runs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import pandas as pd

from qtorch.core.errors import ArgumentError, TrackingError, unknown_name
from qtorch.tracking.current import running_here
from qtorch.tracking.errors import AlreadyInStoreError, NotInStoreError
from qtorch.tracking.experiment import Experiment, MLflowExperiment, Searched, runs_table
from qtorch.tracking.locations import default_uri, resolve_uri
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.recorder import Recorder

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore
    from qtorch.tracking.rows import ExperimentRow

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "Experiment"  # Qlib's


class ExpManager(ABC):
    """Finds, makes, starts and ends experiments. Answers to qlib/workflow/expm.py.

    Difference from Qlib: runs nest, and threads do not see each other's.
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
        """The URI where no run is active: set here, else `qtorch.init`'s, else the environment's,
        else `mlruns/mlflow.db` under the working folder."""
        return self._local_uri.get() or self._uri or default_uri()

    @default_uri.setter
    def default_uri(self, uri: str | None) -> None:
        self._uri = None if uri is None else resolve_uri(uri)

    @contextmanager
    def uri_context(self, uri: str) -> Iterator[None]:
        """Another default URI inside a `with` block, in this context (thread) alone."""
        token = self._local_uri.set(resolve_uri(uri))
        try:
            yield
        finally:
            self._local_uri.reset(token)

    @property
    @abstractmethod
    def uri(self) -> str:
        """The URI in force: the active run's, else `default_uri`."""

    @property
    @abstractmethod
    def active_experiment(self) -> Experiment | None:
        """The experiment of the innermost running recorder of this context."""

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
        """Start a run in an experiment, which is made if need be."""

    @abstractmethod
    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the innermost running recorder of this context, if there is one."""

    @abstractmethod
    def create_exp(self, experiment_name: str | None = None) -> Experiment:
        """A new experiment; AlreadyInStoreError where the name is taken."""

    @abstractmethod
    def get_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> Experiment:
        """The experiment of that id or name; the active one, else the default one, by default."""

    @abstractmethod
    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment deleted."""

    @abstractmethod
    def list_experiments(self) -> dict[str, Experiment]:
        """`{name: experiment}` of all that are not deleted."""

    @abstractmethod
    def search_records(
        self,
        experiment_ids: Searched = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Searched = None,
    ) -> pd.DataFrame:
        """Runs as a table, one row a run."""


class MLflowExpManager(ExpManager):
    """The manager on MLflow."""

    @property
    def uri(self) -> str:
        """The URI in force: the active run's, else `default_uri`."""
        active = self._active_recorder
        return active.uri if active else self.default_uri

    @property
    def _active_recorder(self) -> MLflowRecorder | None:
        for recorder in reversed(running_here()):
            if isinstance(recorder, MLflowRecorder):
                return recorder
        return None

    @property
    def active_experiment(self) -> MLflowExperiment | None:
        """The experiment of the innermost running recorder of this context."""
        active = self._active_recorder
        if active is None:
            return None
        name = active.experiment_name
        if name is None:
            row = self._store().experiment(id=active.experiment_id)
            name = row.name if row else ""
        return MLflowExperiment(active.experiment_id, name, active.uri)

    def _store(self, uri: str | None = None) -> MLflowStore:
        from qtorch.tracking.mlflow_store import store_at

        return store_at(uri or self.uri)

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
        """Start a run in an experiment, which is made if need be.

        With a `recorder_id` and no experiment the run's own experiment is taken.
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
        """End the innermost running recorder of this context, if there is one."""
        active = self._active_recorder
        if active is not None:
            active.end_run(recorder_status)

    def create_exp(self, experiment_name: str | None = None) -> MLflowExperiment:
        """A new experiment; AlreadyInStoreError where the name is taken."""
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
        """The experiment of that id or name; the active one, else the default one, by default.

        `create` makes one of that name where there is none, otherwise NotInStoreError; `start`
        starts a run in it where none is active.
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
            experiment = self._existing(store, experiment_id, experiment_name)
        if start and active is None:
            experiment.start()
        return experiment

    def recorder(self, recorder_id: str) -> MLflowRecorder:
        """The run of that id, whatever its experiment; NotInStoreError where there is none."""
        row = self._store().run(recorder_id)
        experiment = self.get_exp(experiment_id=row.experiment_id, create=False)
        return experiment.get_recorder(recorder_id, create=False)

    def _find(self, store: MLflowStore, id: str | None, name: str | None) -> ExperimentRow | None:
        row = store.experiment(id=id, name=name)
        if row is not None and row.deleted:
            raise NotInStoreError(
                f"the experiment {row.name!r} (id {row.id}) is deleted; `mlflow experiments "
                f"restore -x {row.id}` brings it back, or take another name."
            )
        return row

    def _existing(self, store: MLflowStore, id: str | None, name: str | None) -> MLflowExperiment:
        row = self._find(store, id, name)
        if row is None:
            known = store.experiments()
            valid = [e.name for e in known] if id is None else [e.id for e in known]
            raise NotInStoreError(unknown_name("experiment", str(id or name), valid))
        return MLflowExperiment(row.id, row.name, store.uri)

    def _get_or_create(
        self, store: MLflowStore, id: str | None, name: str | None
    ) -> MLflowExperiment:
        if id is not None:
            return self._existing(store, id, None)
        row = self._find(store, None, name)
        if row is None:
            try:
                row = store.create_experiment(name or self._default_exp_name)
                log.info("made the experiment %r", row.name)
            except AlreadyInStoreError:  # another process was quicker
                row = self._find(store, None, name)
        if row is None:
            raise TrackingError(f"the experiment {name!r} can neither be read nor made.")
        return MLflowExperiment(row.id, row.name, store.uri)

    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment deleted; NotInStoreError where there is none."""
        if experiment_id is None and experiment_name is None:
            raise ArgumentError("delete_exp needs an experiment_id or an experiment_name.")
        store = self._store()
        store.delete_experiment(self._existing(store, experiment_id, experiment_name).id)

    def list_experiments(self) -> dict[str, Experiment]:
        """`{name: experiment}` of all that are not deleted."""
        store = self._store()
        return {e.name: MLflowExperiment(e.id, e.name, store.uri) for e in store.experiments()}

    def search_records(
        self,
        experiment_ids: Searched = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Searched = None,
    ) -> pd.DataFrame:
        """Runs as a table, one row a run; all experiments by default.

        `filter_string` and `order_by` are MLflow's (`metrics.IC > 0.02`), `run_view_type` 1 is
        what is not deleted, 2 what is, 3 both. Columns: `qtorch.tracking.experiment.runs_table`.
        Difference from Qlib: this is the DataFrame that Qlib documents, not a list of runs.
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


#: The process's own manager: `R`'s, so that its `set_uri` and `uri_context` hold for whoever looks
#: a run up.
MANAGER = MLflowExpManager()
