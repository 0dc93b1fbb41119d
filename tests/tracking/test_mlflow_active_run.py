"""MLflow's own functions inside `R.start`: they log to that run, and nothing remains afterwards."""

from __future__ import annotations

import os
import threading

import mlflow
import pytest
from matplotlib.figure import Figure

from qtorch import R
from qtorch.tracking import mlflow_active_run


@pytest.fixture(autouse=True)
def mlflow_settings():
    """MLflow's tracking URI as the user has set it, which is not qtorch's."""
    mlflow.set_tracking_uri("sqlite:///own.db")
    variable = os.environ["MLFLOW_TRACKING_URI"]
    yield
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == "sqlite:///own.db"
    assert os.environ["MLFLOW_TRACKING_URI"] == variable
    mlflow.set_tracking_uri(None)


def test_functions_of_mlflow_log_to_the_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/runs.db"
    with R.start(experiment_name="e", uri=uri):
        recorder = R.get_recorder()
        mlflow.log_metric("loss", 0.5)
        mlflow.log_param("depth", 3)
        mlflow.log_figure(Figure(), "empty.png")
        mlflow.set_tag("kind", "mine")
        assert mlflow.active_run().info.run_id == recorder.id
    assert recorder.list_metrics() == {"loss": 0.5}
    assert recorder.list_params()["depth"] == "3"
    assert recorder.list_tags()["kind"] == "mine"
    assert "empty.png" in recorder.list_artifacts()
    assert recorder.status == "FINISHED"
    with R.uri_context(uri):
        assert R.get_recorder(recorder_id=recorder.id).status == "FINISHED"


def test_nested_runs_and_runs_of_the_user_keep_their_order():
    with R.start(experiment_name="outer"):
        outer = R.get_recorder()
        with R.start(experiment_name="inner"):
            inner = R.get_recorder()
            mlflow.log_metric("a", 1)
        with mlflow.start_run(nested=True) as own:
            mlflow.log_metric("a", 2)
        mlflow.log_metric("a", 3)
    values = [r.list_metrics()["a"] for r in (outer, inner)]
    assert values == [3, 1]
    with R.uri_context(outer.uri):
        assert R.get_recorder(recorder_id=own.info.run_id).list_metrics() == {"a": 2}
    assert own.info.experiment_id == outer.experiment_id
    assert own.data.tags["mlflow.parentRunId"] == outer.id


def test_experiment_of_the_user_is_active_again_after_the_run():
    experiment = mlflow.set_experiment("mine")
    with R.start(experiment_name="e"):
        first = R.get_recorder()
        with mlflow.start_run(nested=True) as child:
            assert child.info.experiment_id == first.experiment_id
    with mlflow.start_run() as run:
        assert run.info.experiment_id == experiment.experiment_id
    with R.start(experiment_name="e"):
        other = mlflow.set_experiment("other")  # what the user sets stays
    uri = R.get_uri()
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run() as run:
        assert run.info.experiment_id == other.experiment_id
    mlflow.set_tracking_uri("sqlite:///own.db")


def test_failed_run_and_end_in_another_thread_leave_no_active_run():
    with pytest.raises(ZeroDivisionError), R.start(experiment_name="e"):
        1 / 0
    assert mlflow.active_run() is None
    R.start_exp(experiment_name="e")
    thread = threading.Thread(target=R.get_recorder().end_run)
    thread.start()
    thread.join()
    assert mlflow.active_run() is None


def test_user_can_end_the_run_or_change_the_uri_inside():
    with R.start(experiment_name="e"):
        recorder = R.get_recorder()
        mlflow.end_run()
        mlflow.set_tracking_uri("sqlite:///own.db")
    assert recorder.status == "FINISHED"


def test_mlflow_has_the_private_parts():
    """`mlflow_active_run` relies on them; a new version of MLflow may rename them."""
    assert mlflow_active_run._stack() == []
    assert hasattr(mlflow_active_run.tracking_service, "_tracking_uri")
