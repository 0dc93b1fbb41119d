"""`R`, the object that programs use to start runs, log to them and find them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.tracking.errors import NotInStoreError
from qtorch.tracking.experiment import MLflowExperiment, Names
from qtorch.tracking.manager import MANAGER, MLflowExpManager
from qtorch.tracking.mlflow_recorder import MLflowRecorder
from qtorch.tracking.recorder import Recorder, final_status

log = logging.getLogger(__name__)


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
