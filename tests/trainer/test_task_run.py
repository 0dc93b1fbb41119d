"""Training of one task in one run."""

from __future__ import annotations

import copy
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest

import qtorch
from qtorch import R
from qtorch.core.errors import ConfigError, TrustError
from qtorch.core.trust import as_stored_text
from qtorch.tracking import Recorder
from qtorch.trainer import begin_task_train, end_task_train, task_train
from qtorch.trainer.run import complete_task


@pytest.mark.slow
def test_run_contains_params_artifacts_and_metrics(make_task):
    task = make_task(value=0.5)
    task_copy = copy.deepcopy(task)
    recorder = task_train(task, "exp", "named")
    assert task == task_copy
    assert recorder.status == Recorder.STATUS_FI
    assert recorder.name == "named"
    params = recorder.list_params()
    assert params["model.kwargs.value"] == "0.5"
    assert params["dataset.kwargs.noise"] == "0.5"
    assert params["seed"] == "3"
    assert recorder.list_tags()["hostname"] == socket.gethostname()
    assert recorder.load_object("task") == task_copy
    assert recorder.load_object("params.pkl", unpickler=pickle.Unpickler).value == 0.5
    assert recorder.load_object("dataset", unpickler=pickle.Unpickler).noise == 0.5
    assert list(recorder.load_object("pred.pkl").columns) == ["score"]
    assert len(recorder.load_object("label.pkl")) == 30
    assert "random_number" in recorder.list_metrics()
    assert "Rank ICIR" in recorder.list_metrics()


def test_seed_comes_from_task_then_session(make_task):
    draws = [
        task_train(make_task(seed=s, record=[]), "exp").list_metrics()["random_number"]
        for s in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]
    qtorch.init(seed=9)
    assert complete_task(make_task(seed=None))["seed"] == 9
    assert complete_task(make_task(seed=5))["seed"] == 5


def test_random_seed_is_stored_in_the_task(make_task):
    recorder = task_train(make_task(seed=None, record=[]), "exp")
    repeated_run = task_train(recorder.load_object("task"), "exp")
    assert repeated_run.list_metrics()["random_number"] == recorder.list_metrics()["random_number"]


def test_handler_without_a_source_gets_the_sessions(tmp_path, monkeypatch):
    handler = {"class": "Alpha158", "module_path": "qtorch.data", "kwargs": {"instruments": "all"}}
    task = {"model": {}, "dataset": {"_target_": "x.D", "handler": handler}}
    assert complete_task(task)["dataset"]["handler"] == handler
    monkeypatch.chdir(tmp_path)
    qtorch.init(provider_uri="bars")
    source = complete_task(task)["dataset"]["handler"]["kwargs"]["source"]
    assert source["provider_uri"] == str(tmp_path / "bars")


def test_relative_paths_of_the_data_become_absolute(tmp_path, monkeypatch):
    """They start where the command began, and a worker in another folder finds them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "frame.csv").touch()
    (tmp_path / "elsewhere").mkdir()
    qtorch.init()
    monkeypatch.chdir(tmp_path / "elsewhere")
    handler = {
        "_target_": "y.H",
        "source": {"_target_": "z.S", "path": "mine.csv", "universes": "~/members.csv"},
        "data_loader": {"_target_": "z.L", "config": {"feature": "frame.csv", "label": "$close"}},
    }
    extras = {"concept": {"_target_": "z.C", "table": "concepts.csv"}}
    dataset = {"_target_": "x.D", "handler": handler, "extras": extras}
    completed = complete_task({"model": {}, "dataset": dataset})["dataset"]
    assert completed["extras"]["concept"]["table"] == f"{tmp_path}/concepts.csv"
    assert completed["handler"]["source"] == {
        "_target_": "z.S",
        "path": f"{tmp_path}/mine.csv",
        "universes": f"{tmp_path}/me/members.csv",
    }
    loader_config = completed["handler"]["data_loader"]["config"]
    assert loader_config == {"feature": f"{tmp_path}/frame.csv", "label": "$close"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"model": {}}, "no 'dataset'"),
        ({"model": {}, "datset": {}}, "'dataset'"),
        ([], "a task must be a dict"),
    ],
)
def test_invalid_task_is_rejected_before_a_run_is_created(task, message):
    with pytest.raises(ConfigError, match=message):
        task_train(task, "exp")
    assert "exp" not in R.list_experiments()


def test_error_is_stored_in_the_failed_run_and_raised(make_task):
    with pytest.raises(ValueError, match="this model fails"):
        task_train(make_task(fail="error"), "exp")
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_FA
    assert recorder.list_tags()["error"] == "ValueError: this model fails on two lines"
    assert "in fit" in Path(recorder.download_artifact("error.txt")).read_text()


def test_untrusted_name_in_a_stored_task_is_refused_before_the_training(make_task, tmp_path):
    task = make_task(log=str(tmp_path / "fits"), record=[{"_target_": "os.system"}])
    with pytest.raises(TrustError, match=r"os\.system"):
        task_train(as_stored_text(task), "exp")
    assert not (tmp_path / "fits").exists()


@pytest.mark.parametrize(
    ("fail", "error"), [("interrupt", KeyboardInterrupt), ("exit", SystemExit)]
)
def test_interruption_marks_the_run_killed(make_task, fail, error):
    with pytest.raises(error):
        task_train(make_task(fail=fail), "exp")
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_K


@pytest.mark.slow
def test_begin_and_end_task_train_share_one_run(make_task):
    prepared_run = begin_task_train(make_task(), "exp")
    assert prepared_run.status == Recorder.STATUS_S
    assert prepared_run.load_object("task")["seed"] == 3
    assert prepared_run.list_metrics() == {}
    stored_run = R.get_recorder(recorder_id=prepared_run.id, experiment_name="exp")
    finished_run = end_task_train(stored_run, "exp")
    assert (finished_run.id, finished_run.status) == (prepared_run.id, Recorder.STATUS_FI)
    assert (
        finished_run.list_metrics()["random_number"]
        == task_train(make_task(), "exp").list_metrics()["random_number"]
    )


@pytest.mark.slow
def test_records_run_in_order_with_placeholders_and_signature_arguments(make_task, fakes):
    path_record = {"class": "PathRecord", "module_path": fakes}
    records = [
        {**path_record, "kwargs": {"note": "1", "model": "<MODEL>", "dataset": "<DATASET>"}},
        {**path_record, "kwargs": {"note": "2"}},
        {"class": "SignalRecord", "module_path": "qtorch.record", "kwargs": {}},
        "SigAnaRecord",
    ]
    recorder = task_train(make_task(record=records), "exp")
    classes = {"model": "FakeModel", "dataset": "FakeDataset"}
    assert recorder.load_object("classes1") == recorder.load_object("classes2") == classes
    assert "IC" in recorder.list_metrics()
    single_record_run = task_train(make_task(record=records[2]), "exp")
    assert len(single_record_run.load_object("pred.pkl")) == 30


def test_record_before_its_dependency_fails_with_a_hint(make_task):
    with pytest.raises(ConfigError, match="SigAnaRecord needs the SignalRecord before it"):
        task_train(make_task(record=["SigAnaRecord", "SignalRecord"]), "exp")
    assert "exp" not in R.list_experiments()


def test_live_model_and_dataset_are_used_directly(make_task):
    from qtorch.core.instantiate import init_instance_by_config

    task = make_task(value=1.0)
    model = init_instance_by_config(task["model"])
    dataset = init_instance_by_config(task["dataset"])
    recorder = task_train({"model": model, "dataset": dataset, "record": []}, "exp")
    assert recorder.status == Recorder.STATUS_FI
    assert model.random_number is not None
    assert recorder.list_params()["model.value"] == "1.0"


def test_a_task_with_qlibs_names_is_trained_in_one_or_two_phases(make_task, qlib_records):
    task = make_task(record=qlib_records)
    expected_metrics = task_train(make_task(), "own names").list_metrics()
    recorder = task_train(task, "names of qlib")
    assert recorder.list_metrics() == expected_metrics
    assert recorder.load_object("task")["record"][0]["_target_"] == "qtorch.record.SignalRecord"
    first_phase = begin_task_train(task, "names of qlib")
    assert end_task_train(first_phase).list_metrics() == expected_metrics


@pytest.fixture
def qlib_records() -> list[dict[str, Any]]:
    module = "qlib.workflow.record_temp"
    placeholders = {"model": "<MODEL>", "dataset": "<DATASET>"}
    analysis = {"ana_long_short": False, "ann_scaler": 252}
    return [
        {"class": "SignalRecord", "module_path": module, "kwargs": placeholders},
        {"class": "SigAnaRecord", "module_path": module, "kwargs": analysis},
    ]
