"""One task, one run."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import pytest

import qtorch
from qtorch import R
from qtorch.core.errors import ConfigError, RecordError
from qtorch.tracking import Recorder
from qtorch.trainer import begin_task_train, end_task_train, task_train
from qtorch.trainer.prepare import complete_task


@pytest.mark.slow
def test_a_run_holds_what_the_contract_names(make_task):
    task = make_task(value=0.5)
    before = copy.deepcopy(task)
    recorder = task_train(task, "exp", "named")
    assert task == before
    assert recorder.status == Recorder.STATUS_FI
    assert recorder.name == "named"
    params = recorder.list_params()
    assert params["model.kwargs.value"] == "0.5"
    assert params["dataset.kwargs.noise"] == "0.5"
    assert params["seed"] == "3"
    assert recorder.list_tags()["hostname"] == socket.gethostname()
    assert recorder.load_object("task") == before
    assert recorder.load_object("params.pkl").value == 0.5
    assert recorder.load_object("dataset").noise == 0.5
    assert list(recorder.load_object("pred.pkl").columns) == ["score"]
    assert len(recorder.load_object("label.pkl")) == 30
    assert "drawn" in recorder.list_metrics()
    assert "Rank ICIR" in recorder.list_metrics()


def test_the_seed_is_the_tasks_then_the_sessions_then_a_drawn_one(make_task):
    draws = [
        task_train(make_task(seed=s, record=[]), "exp").list_metrics()["drawn"] for s in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]
    qtorch.init(seed=9)
    assert complete_task(make_task(seed=None))["seed"] == 9
    assert complete_task(make_task(seed=5))["seed"] == 5


def test_a_drawn_seed_is_written_into_the_stored_task(make_task):
    recorder = task_train(make_task(seed=None, record=[]), "exp")
    again = task_train(recorder.load_object("task"), "exp")
    assert again.list_metrics()["drawn"] == recorder.list_metrics()["drawn"]


def test_the_sessions_source_goes_into_a_handler_that_names_none(tmp_path, monkeypatch):
    handler = {"class": "Alpha158", "module_path": "qtorch.data", "kwargs": {"instruments": "all"}}
    task = {"model": {}, "dataset": {"_target_": "x.D", "handler": handler}}
    assert complete_task(task)["dataset"]["handler"] == handler
    monkeypatch.chdir(tmp_path)
    qtorch.init(provider_uri="bars")
    source = complete_task(task)["dataset"]["handler"]["kwargs"]["source"]
    assert source["provider_uri"] == str(tmp_path / "bars")
    own = {"_target_": "y.H", "source": {"_target_": "z.S", "path": "mine.csv"}}
    kept = complete_task({**task, "dataset": {"_target_": "x.D", "handler": own}})
    assert kept["dataset"]["handler"]["source"]["path"] == str(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"model": {}}, "no 'dataset'"),
        ({"model": {}, "datset": {}}, "'dataset'"),
        ([], "a task is a dict"),
    ],
)
def test_what_is_no_task_is_refused_before_a_run_is_made(task, said):
    with pytest.raises(ConfigError, match=said):
        task_train(task, "exp")
    assert "exp" not in R.list_experiments()


def test_an_error_stays_in_the_failed_run_and_is_raised_as_it_was(make_task):
    with pytest.raises(ValueError, match="this model fails"):
        task_train(make_task(fail="error"), "exp")
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_FA
    assert recorder.list_tags()["error"] == "ValueError: this model fails on two lines"
    assert "in fit" in Path(recorder.download_artifact("error.txt")).read_text()


@pytest.mark.parametrize(
    ("how", "raised"), [("interrupt", KeyboardInterrupt), ("exit", SystemExit)]
)
def test_an_interruption_leaves_a_killed_run(make_task, how, raised):
    with pytest.raises(raised):
        task_train(make_task(fail=how), "exp")
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_K


@pytest.mark.slow
def test_begin_prepares_and_end_does_the_rest_in_the_same_run(make_task):
    begun = begin_task_train(make_task(), "exp")
    assert begun.status == Recorder.STATUS_S
    assert begun.load_object("task")["seed"] == 3
    assert begun.list_metrics() == {}
    found = R.get_recorder(recorder_id=begun.id, experiment_name="exp")
    ended = end_task_train(found, "exp")
    assert (ended.id, ended.status) == (begun.id, Recorder.STATUS_FI)
    assert ended.list_metrics()["drawn"] == task_train(make_task(), "exp").list_metrics()["drawn"]


@pytest.mark.slow
def test_records_run_in_order_and_get_placeholders_or_what_their_signature_takes(make_task, fakes):
    where = {"class": "PathRecord", "module_path": fakes}
    records = [
        {**where, "kwargs": {"note": "1", "model": "<MODEL>", "dataset": "<DATASET>"}},
        {**where, "kwargs": {"note": "2"}},
        {"class": "SignalRecord", "module_path": "qtorch.record", "kwargs": {}},
        "SigAnaRecord",
    ]
    recorder = task_train(make_task(record=records), "exp")
    told = {"model": "FakeModel", "dataset": "FakeDataset"}
    assert recorder.load_object("told1") == recorder.load_object("told2") == told
    assert "IC" in recorder.list_metrics()
    one = task_train(make_task(record=records[2]), "exp")
    assert len(one.load_object("pred.pkl")) == 30


def test_a_record_before_what_it_depends_on_fails_by_name(make_task):
    with pytest.raises(RecordError, match=r"pred\.pkl.*Put SignalRecord before it"):
        task_train(make_task(record=["SigAnaRecord", "SignalRecord"]), "exp")
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_FA


def test_live_objects_are_taken_as_they_are(make_task):
    from qtorch.core.instantiate import init_instance_by_config

    task = make_task(value=1.0)
    model = init_instance_by_config(task["model"])
    dataset = init_instance_by_config(task["dataset"])
    recorder = task_train({"model": model, "dataset": dataset, "record": []}, "exp")
    assert recorder.status == Recorder.STATUS_FI
    assert model.drawn is not None
    assert recorder.list_params()["model.value"] == "1.0"
