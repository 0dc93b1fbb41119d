"""Experiment managers: find, create, start and end the experiments of a tracking store."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qtorch.core.errors import ArgumentError, TrackingError, unknown_name_message
from qtorch.tracking.experiment import Experiment, MLflowExperiment, Names, runs_table
from qtorch.tracking.locations import default_uri, resolve_uri
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.recorder import Recorder, final_status, visible_recorders
from qtorch.tracking.store_types import AlreadyInStoreError, NotInStoreError

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore
    from qtorch.tracking.store_types import ExperimentRow


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
            raise NotInStoreError(unknown_name_message("experiment", str(id or name), valid))
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


class Workflow:
    """The class of `R`, on top of an experiment manager. Corresponds to Qlib's QlibRecorder.

    Logging without an active run starts one in the default experiment, as in Qlib. That run ends
    with the program.
    """

    def __init__(self, exp_manager: MLflowExpManager) -> None:
        self.exp_manager = exp_manager

    def __repr__(self) -> str:
        return f"R(manager={self.exp_manager!r})"

    @contextmanager
    def start(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        uri: str | None = None,
        resume: bool = False,
    ) -> Iterator[MLflowExperiment]:
        """Run a `with` block inside a run; yields the experiment.

        The run ends as FINISHED, as FAILED on an exception, or as KILLED on Ctrl-C and SystemExit.
        `resume` with a `recorder_id` or `recorder_name` resumes that run.
        """
        experiment = self.start_exp(
            experiment_id=experiment_id,
            experiment_name=experiment_name,
            recorder_id=recorder_id,
            recorder_name=recorder_name,
            uri=uri,
            resume=resume,
        )
        recorder = self.get_recorder()
        try:
            yield experiment
        except BaseException as error:
            try:
                recorder.end_run(final_status(type(error)))
            except Exception as end_error:
                log.error("could not end run %s: %s", recorder.id, end_error)
            raise
        if recorder.status == Recorder.STATUS_R:  # not yet ended inside the block
            recorder.end_run(Recorder.STATUS_FI)

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
        """Start a run that `end_exp` ends; prefer `start`, which sets the final status itself."""
        return self.exp_manager.start_exp(
            experiment_id=experiment_id,
            experiment_name=experiment_name,
            recorder_id=recorder_id,
            recorder_name=recorder_name,
            uri=uri,
            resume=resume,
        )

    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the active run if there is one."""
        self.exp_manager.end_exp(recorder_status)

    def search_records(
        self,
        experiment_ids: Names = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Names = None,
    ) -> pd.DataFrame:
        """Return runs as a table, like `MLflowExpManager.search_records`."""
        return self.exp_manager.search_records(
            experiment_ids,
            filter_string=filter_string,
            run_view_type=run_view_type,
            max_results=max_results,
            order_by=order_by,
        )

    def list_experiments(self) -> dict[str, Any]:
        """Return `{name: experiment}` of all experiments that are not deleted."""
        return self.exp_manager.list_experiments()

    def list_recorders(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> dict[str, MLflowRecorder]:
        """Return `{id: recorder}` of an experiment, by default the active or the default one.

        Difference from Qlib: a missing experiment raises NotInStoreError and is not created.
        """
        experiment = self.get_exp(
            experiment_id=experiment_id, experiment_name=experiment_name, create=False
        )
        recorders: dict[str, MLflowRecorder] = experiment.list_recorders()
        return recorders

    def get_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> MLflowExperiment:
        """Return the experiment with an ID or name, by default the active or the default one."""
        return self.exp_manager.get_exp(
            experiment_id=experiment_id,
            experiment_name=experiment_name,
            create=create,
            start=start,
        )

    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment as deleted."""
        self.exp_manager.delete_exp(experiment_id, experiment_name)

    def get_uri(self) -> str:
        """Return the current tracking URI."""
        return self.exp_manager.uri

    def set_uri(self, uri: str | None) -> None:
        """Set this process's default tracking URI; None restores the one from `qtorch.init`."""
        self.exp_manager.default_uri = uri

    @contextmanager
    def uri_context(self, uri: str) -> Iterator[None]:
        """Use another default tracking URI inside a `with` block, in this thread only."""
        with self.exp_manager.uri_context(uri):
            yield

    def get_recorder(
        self,
        *,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
    ) -> MLflowRecorder:
        """Return the active run, or the run with an ID or name (the newest of a name).

        An ID needs no experiment; if one is given, the run must be in it. Otherwise raises
        NotInStoreError.
        """
        manager = self.exp_manager
        if recorder_id is not None and experiment_id is None and experiment_name is None:
            return manager.recorder(recorder_id)
        if recorder_id is None and recorder_name is None and manager.active_experiment is None:
            raise NotInStoreError(
                "no run is active: pass get_recorder a recorder_id or call it inside R.start(...)."
            )
        return self.get_exp(
            experiment_id=experiment_id, experiment_name=experiment_name, create=False
        ).get_recorder(recorder_id, recorder_name, create=False)

    def delete_recorder(
        self, recorder_id: str | None = None, recorder_name: str | None = None
    ) -> None:
        """Mark a run as deleted, by ID, or the newest of a name in the current experiment."""
        if recorder_id is None and recorder_name is None:
            raise ArgumentError("delete_recorder needs a recorder_id or a recorder_name.")
        recorder = self.get_recorder(recorder_id=recorder_id, recorder_name=recorder_name)
        self.get_exp(experiment_id=recorder.experiment_id).delete_recorder(recorder_id=recorder.id)

    def _active_or_new_recorder(self) -> MLflowRecorder:
        """Return the active run; start one if there is none."""
        if self.exp_manager.active_experiment is None:
            log.warning("no run is active: starting one in the default experiment")
        return self.get_exp(start=True).get_recorder(start=True)

    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Save objects by logical name (`**{"pred.pkl": pred}`), or the content of a local path."""
        self._active_or_new_recorder().save_objects(local_path, artifact_path, **kwargs)

    def load_object(self, name: str) -> Any:
        """Load an object of the active run by its logical name."""
        return self.get_recorder().load_object(name)

    def log_params(self, **kwargs: Any) -> None:
        """Log params to the active run."""
        self._active_or_new_recorder().log_params(**kwargs)

    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Log metrics to the active run."""
        self._active_or_new_recorder().log_metrics(step, **kwargs)

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Log a local file or folder to the active run."""
        self._active_or_new_recorder().log_artifact(local_path, artifact_path)

    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """Return the local path of an artifact of the active run."""
        return self.get_recorder().download_artifact(path, dst_path)

    def set_tags(self, **kwargs: Any) -> None:
        """Set tags of the active run."""
        self._active_or_new_recorder().set_tags(**kwargs)


R = Workflow(MANAGER)
