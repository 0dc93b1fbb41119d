"""R and the experiment manager: find, create, start and end the experiments of a tracking store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from qtorch.core.errors import ArgumentError, unknown_name_message
from qtorch.core.lazy import quick_imports
from qtorch.core.secrets import redact_urls
from qtorch.tracking.claims import share_run
from qtorch.tracking.experiment import Experiment, runs_table
from qtorch.tracking.locations import default_uri, resolve_uri
from qtorch.tracking.recorder import Recorder, current_recorder, final_status
from qtorch.tracking.store_types import AlreadyInStoreError, NotInStoreError

if TYPE_CHECKING:
    from qtorch.tracking.mlflow_store import MLflowStore

log = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "Experiment"  # Qlib's


class ExpManager:
    """Finds, creates, starts and ends experiments. Corresponds to qlib/workflow/expm.py.

    Differences from Qlib: MLflow is the only backend, so that there is no separate interface; runs
    can be nested, and threads do not see each other's runs.
    """

    def __init__(
        self, uri: str | None = None, default_exp_name: str | None = DEFAULT_EXPERIMENT
    ) -> None:
        self._uri = None if uri is None else resolve_uri(uri)
        self._local_uri: ContextVar[str | None] = ContextVar("qtorch_tracking_uri", default=None)
        self._default_exp_name = default_exp_name or DEFAULT_EXPERIMENT

    def __repr__(self) -> str:
        return f"{type(self).__name__}(uri={redact_urls(self.uri)!r})"

    @property
    def uri(self) -> str:
        """The current tracking URI: the active run's, else `default_uri`."""
        active = current_recorder()
        return active.uri if active else self.default_uri

    @property
    def client(self) -> Any:
        """The MlflowClient of the store."""
        return self._store().client

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
    def active_experiment(self) -> Experiment | None:
        """The experiment of the innermost running recorder of this context."""
        active = current_recorder()
        if active is None:
            return None
        name = active.experiment_name
        if name is None:
            row = self._store().experiment(id=active.experiment_id)
            name = row.name if row else ""
        return Experiment(active.experiment_id, name, active.uri)

    def _store(self, uri: str | None = None) -> MLflowStore:
        with quick_imports():
            from qtorch.tracking.mlflow_store import open_store

        return open_store(uri or self.uri)

    def start_exp(
        self,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        uri: str | None = None,
        resume: bool = False,
    ) -> Experiment:
        """Start a run in an experiment, which is created if it does not exist.

        `resume` with a `recorder_id` or `recorder_name` resumes that run; if `recorder_id` is given
        without an experiment, the run's own experiment is used. The run ends with `end_exp`;
        prefer `R.start`, which sets the final status itself.
        """
        store = self._store(uri or self.default_uri)
        if resume and recorder_id and experiment_id is None and experiment_name is None:
            experiment_id = store.run(recorder_id).experiment_id
        experiment = self._find_exp(store, experiment_id, experiment_name, create=True)
        experiment.start(recorder_id=recorder_id, recorder_name=recorder_name, resume=resume)
        return experiment

    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the innermost running recorder of this context if there is one."""
        active = current_recorder()
        if active is not None:
            active.end_run(recorder_status)

    def create_exp(self, experiment_name: str | None = None) -> Experiment:
        """Create an experiment; AlreadyInStoreError if the name exists."""
        store = self._store()
        row = store.create_experiment(experiment_name or self._default_exp_name)
        return Experiment(row.id, row.name, store.uri)

    def get_exp(
        self,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        create: bool = True,
        start: bool = False,
    ) -> Experiment:
        """Return the experiment with an ID or name, by default the active or the default one.

        If there is none with the name, `create` creates it; NotInStoreError without `create`.
        `start` starts a run in the experiment if none is active.
        """
        active = self.active_experiment
        if experiment_id is None and experiment_name is None and active is not None:
            return active
        experiment = self._find_exp(self._store(), experiment_id, experiment_name, create=create)
        if start and active is None:
            experiment.start()
        return experiment

    def _find_exp(
        self, store: MLflowStore, id: str | None, name: str | None, *, create: bool
    ) -> Experiment:
        """Return an experiment that is not deleted; `create` creates one with a new name."""
        is_default = id is None and not name
        if is_default:
            name = self._default_exp_name
        row = store.experiment(id=id, name=name)
        if row is None and name is not None and id is None and create:
            try:
                row = store.create_experiment(name)
                log.info("created experiment %r", name)
            except AlreadyInStoreError:  # another process created it first
                row = store.experiment(name=name)
        if row is None:
            existing = store.experiments()
            valid = [e.name for e in existing] if id is None else [e.id for e in existing]
            message = unknown_name_message("experiment", str(id or name), valid)
            if is_default:
                message = f"pass experiment_name, because {name!r} is only the default: {message}"
            raise NotInStoreError(message)
        if row.is_deleted:
            raise NotInStoreError(
                f"the experiment {row.name!r} (ID {row.id}) is deleted; restore it with `mlflow "
                f"experiments restore -x {row.id}` or use another name."
            )
        return Experiment(row.id, row.name, store.uri)

    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment as deleted; NotInStoreError if there is none."""
        if experiment_id is None and experiment_name is None:
            raise ArgumentError("delete_exp needs an experiment_id or an experiment_name.")
        store = self._store()
        experiment = self._find_exp(store, experiment_id, experiment_name, create=False)
        store.delete_experiment(experiment.id)

    def list_experiments(self) -> dict[str, Experiment]:
        """Return `{name: experiment}` of all experiments that are not deleted."""
        store = self._store()
        return {e.name: Experiment(e.id, e.name, store.uri) for e in store.experiments()}

    def search_records(
        self,
        experiment_ids: Sequence[str] | None = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Sequence[str] | None = None,
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
        elif experiment_ids is None:
            experiment_ids = [e.id for e in store.experiments()]
        rows = store.runs(
            experiment_ids,
            filter_string=filter_string,
            run_view_type=run_view_type,
            max_results=max_results,
            order_by=order_by,
        )
        return runs_table(rows)


MLflowExpManager = ExpManager  # Qlib's name of the class that uses MLflow


class Workflow(ExpManager):
    """The class of `R`: the manager of this process, with shortcuts to its active run.

    Corresponds to Qlib's QlibRecorder. Logging without an active run starts one in the default
    experiment, as in Qlib. That run ends with the program.
    """

    @property
    def exp_manager(self) -> Self:
        """R itself; in Qlib the manager is an object of its own."""
        return self

    @contextmanager
    def start(
        self,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        uri: str | None = None,
        resume: bool = False,
    ) -> Iterator[Experiment]:
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
            with share_run(str(recorder.id), recorder.uri):
                yield experiment
        except BaseException as error:
            try:
                recorder.end_run(final_status(type(error)))
            except Exception as end_error:
                log.error("could not end run %s: %s", recorder.id, end_error)
            raise
        if recorder.status == Recorder.STATUS_R:  # not yet ended inside the block
            recorder.end_run(Recorder.STATUS_FI)

    def list_recorders(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> dict[str, Recorder]:
        """Return `{id: recorder}` of an experiment, by default the active or the default one.

        Difference from Qlib: a missing experiment raises NotInStoreError and is not created.
        """
        experiment = self.get_exp(
            experiment_id=experiment_id, experiment_name=experiment_name, create=False
        )
        recorders: dict[str, Recorder] = experiment.list_recorders()
        return recorders

    def get_uri(self) -> str:
        """Return the current tracking URI."""
        return self.uri

    def set_uri(self, uri: str | None) -> None:
        """Set this process's default tracking URI; None restores the one from `qtorch.init`."""
        self.default_uri = uri

    def get_recorder(
        self,
        recorder_id: str | None = None,
        recorder_name: str | None = None,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
    ) -> Recorder:
        """Return the active run, or the run with an ID or name (the newest of a name).

        An ID needs no experiment; if one is given, the run must be in it. Otherwise raises
        NotInStoreError.
        """
        if recorder_id is None and recorder_name is None and current_recorder() is None:
            raise NotInStoreError(
                "no run is active: pass get_recorder a recorder_id or call it inside R.start(...)."
            )
        if recorder_id is not None and experiment_id is None and experiment_name is None:
            experiment_id = self._store().run(recorder_id).experiment_id
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

    def _active_or_new_recorder(self) -> Recorder:
        """Return the active run; start one if there is none."""
        if current_recorder() is None:
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


#: The manager of this process: its URI applies to all code that looks up runs.
R = Workflow()


def list_recorders(
    experiment: str | Experiment, rec_filter_func: Callable[[Recorder], bool] | None = None
) -> dict[str, Recorder]:
    """Return `{id: recorder}` of an experiment (its name or itself) that a function selects."""
    if isinstance(experiment, str):
        experiment = R.get_exp(experiment_name=experiment, create=False)
    recorders: dict[str, Recorder] = experiment.list_recorders()
    return {
        key: recorder
        for key, recorder in recorders.items()
        if rec_filter_func is None or rec_filter_func(recorder)
    }


def find_run(run_id: str) -> Recorder:
    """Return the run with an ID from any experiment; NotInStoreError if there is none."""
    return R.get_recorder(recorder_id=run_id)
