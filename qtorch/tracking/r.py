"""`R`: the one object through which a program starts, finds and fills runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.experiment import MLflowExperiment, Searched
from qtorch.tracking.manager import MANAGER, MLflowExpManager
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.recorder import Recorder, final_status

log = logging.getLogger(__name__)


class Workflow:
    """What `R` is: Qlib's QlibRecorder, over an experiment manager.

    Logging without a run starts one in the default experiment, as in Qlib; it ends with the
    program.
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
        """A run around a `with` block; yields its experiment.

        It ends FINISHED, FAILED on an exception, KILLED on Ctrl-C and SystemExit. `resume` with a
        `recorder_id` (or a name) goes on with that run.
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
            except Exception as second:
                log.error("run %s could not be ended: %s", recorder.id, second)
            raise
        if recorder.status == Recorder.STATUS_R:  # not ended inside the block
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
        """Start a run that `end_exp` ends; prefer `start`, which sets the status by itself."""
        return self.exp_manager.start_exp(
            experiment_id=experiment_id,
            experiment_name=experiment_name,
            recorder_id=recorder_id,
            recorder_name=recorder_name,
            uri=uri,
            resume=resume,
        )

    def end_exp(self, recorder_status: str = Recorder.STATUS_FI) -> None:
        """End the active run, if there is one."""
        self.exp_manager.end_exp(recorder_status)

    def search_records(
        self,
        experiment_ids: Searched = None,
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Searched = None,
    ) -> pd.DataFrame:
        """Runs as a table: `MLflowExpManager.search_records`."""
        return self.exp_manager.search_records(
            experiment_ids,
            filter_string=filter_string,
            run_view_type=run_view_type,
            max_results=max_results,
            order_by=order_by,
        )

    def list_experiments(self) -> dict[str, Any]:
        """`{name: experiment}` of all that are not deleted."""
        return self.exp_manager.list_experiments()

    def list_recorders(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> dict[str, MLflowRecorder]:
        """`{id: recorder}` of an experiment, by default the active or the default one.

        Difference from Qlib: an experiment that is not there is a NotInStoreError, not made.
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
        """The experiment of that id or name; the active one, else the default one, by default."""
        return self.exp_manager.get_exp(
            experiment_id=experiment_id,
            experiment_name=experiment_name,
            create=create,
            start=start,
        )

    def delete_exp(
        self, experiment_id: str | None = None, experiment_name: str | None = None
    ) -> None:
        """Mark an experiment deleted."""
        self.exp_manager.delete_exp(experiment_id, experiment_name)

    def get_uri(self) -> str:
        """The tracking URI in force."""
        return self.exp_manager.uri

    def set_uri(self, uri: str | None) -> None:
        """Set this process's default tracking URI; None goes back to `qtorch.init`'s."""
        self.exp_manager.default_uri = uri

    @contextmanager
    def uri_context(self, uri: str) -> Iterator[None]:
        """Another default tracking URI inside a `with` block, in this thread alone."""
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
        """The active run, or the one of that id or name (the newest of that name).

        An id needs no experiment; with one, the run must be of it. NotInStoreError otherwise.
        """
        manager = self.exp_manager
        if recorder_id is not None and experiment_id is None and experiment_name is None:
            return manager.recorder(recorder_id)
        if recorder_id is None and recorder_name is None and manager.active_experiment is None:
            raise NotInStoreError(
                "no run is active: give get_recorder a recorder_id, or call it inside R.start(...)."
            )
        return self.get_exp(
            experiment_id=experiment_id, experiment_name=experiment_name, create=False
        ).get_recorder(recorder_id, recorder_name, create=False)

    def delete_recorder(
        self, recorder_id: str | None = None, recorder_name: str | None = None
    ) -> None:
        """Mark a run deleted, by id or the newest of a name in the active or default experiment."""
        if recorder_id is None and recorder_name is None:
            raise ArgumentError("delete_recorder needs a recorder_id or a recorder_name.")
        found = self.get_recorder(recorder_id=recorder_id, recorder_name=recorder_name)
        self.get_exp(experiment_id=found.experiment_id).delete_recorder(recorder_id=found.id)

    def _recorder(self) -> MLflowRecorder:
        """The active run, started if there is none."""
        if self.exp_manager.active_experiment is None:
            log.warning("no run is active: one is started in the default experiment")
        return self.get_exp(start=True).get_recorder(start=True)

    def save_objects(
        self, local_path: str | Path | None = None, artifact_path: str | None = None, **kwargs: Any
    ) -> None:
        """Objects by logical name (`**{"pred.pkl": pred}`), or the content of a local path."""
        self._recorder().save_objects(local_path, artifact_path, **kwargs)

    def load_object(self, name: str) -> Any:
        """An object of the active run by its logical name."""
        return self.get_recorder().load_object(name)

    def log_params(self, **kwargs: Any) -> None:
        """Params of the active run."""
        self._recorder().log_params(**kwargs)

    def log_metrics(self, step: int | None = None, **kwargs: float) -> None:
        """Metrics of the active run."""
        self._recorder().log_metrics(step, **kwargs)

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """A local file or folder into the active run."""
        self._recorder().log_artifact(local_path, artifact_path)

    def download_artifact(self, path: str, dst_path: str | None = None) -> str:
        """The local path of an artifact of the active run."""
        return self.get_recorder().download_artifact(path, dst_path)

    def set_tags(self, **kwargs: Any) -> None:
        """Tags of the active run."""
        self._recorder().set_tags(**kwargs)


R = Workflow(MANAGER)
