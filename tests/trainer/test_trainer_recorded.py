"""Trainers that run a list of tasks in this process or in subprocesses."""

from __future__ import annotations

import os
import sys

import pytest

from qtorch import R
from qtorch.core.errors import TrackingError
from qtorch.tracking import Recorder
from qtorch.trainer import DelayTrainerR, TrainerR, begin_task_train, task_train
from qtorch.trainer.failure import get_error, record_failure


def train_status(recorder):
    return recorder.list_tags().get("train_status")


def test_empty_list_and_single_task(make_task):
    trainer = TrainerR("exp")
    assert trainer.train([]) == []
    assert trainer([]) == []
    (recorder,) = trainer.train(make_task(record=[]))
    assert train_status(recorder) == "begin_task_train"
    assert trainer.end_train(recorder) == [recorder]
    assert train_status(recorder) == "end_task_train"
    assert (trainer.is_delay(), trainer.has_worker()) == (False, False)
    with pytest.raises(NotImplementedError, match="no workers"):
        trainer.worker()


def test_recorders_keep_task_order_and_a_failure_does_not_stop_others(make_task, caplog):
    values = [0.1, 0.2, 0.3]
    tasks = [make_task(record=[], value=v, fail="error" if v == 0.2 else None) for v in values]
    recorders = TrainerR("exp", default_rec_name="r")(tasks)
    assert [float(r.list_params()["model.kwargs.value"]) for r in recorders] == values
    assert [r.status for r in recorders] == ["FINISHED", "FAILED", "FINISHED"]
    assert [train_status(r) for r in recorders] == ["end_task_train", None, "end_task_train"]
    assert {r.name for r in recorders} == {"r"}
    warnings = [m for m in caplog.messages if m.startswith("1 of 3 tasks failed")]
    assert len(warnings) == 1
    assert recorders[1].id in warnings[0]
    assert "this model fails" in warnings[0]


def test_invalid_task_gets_a_failed_run(make_task):
    recorders = TrainerR("exp")([{"model": {}}, make_task(record=[])])
    assert [r.status for r in recorders] == ["FAILED", "FINISHED"]
    assert "dataset" in recorders[0].list_tags()["error"]


def break_artifacts(recorder, monkeypatch):
    def log_artifact(path):
        raise TrackingError("the disk is full")

    monkeypatch.setattr(recorder, "log_artifact", log_artifact)


def break_tags(recorder, monkeypatch):
    def set_tags(**tags):
        raise TrackingError("the store does not answer")

    monkeypatch.setattr(recorder, "set_tags", set_tags)


@pytest.mark.parametrize("break_store", [break_artifacts, break_tags])
def test_tag_and_traceback_of_a_failure_are_stored_independently(break_store, monkeypatch, caplog):
    with R.start(experiment_name="exp"):
        recorder = R.get_recorder()
        break_store(recorder, monkeypatch)
        record_failure(recorder, ValueError("this model fails"))
    assert (get_error(recorder) is not None) == (break_store is break_artifacts)
    assert ("error.txt" in recorder.list_artifacts()) == (break_store is break_tags)
    assert sum(m.startswith("could not store the error in run") for m in caplog.messages) == 1


@pytest.mark.slow
def test_ctrl_c_stops_the_list(make_task):
    with pytest.raises(KeyboardInterrupt):
        TrainerR("exp")([make_task(fail="interrupt"), make_task()])
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_K


def test_delayed_trainer_fits_in_end_train_and_skips_finished_runs(make_task, tmp_path):
    log = tmp_path / "log"
    trainer = DelayTrainerR("exp")
    assert trainer.is_delay()
    prepared_runs = trainer.train([make_task(record=[], value=v, log=str(log)) for v in (1.0, 2.0)])
    assert [r.status for r in prepared_runs] == ["SCHEDULED", "SCHEDULED"]
    assert not log.exists()
    trainer.end_train(prepared_runs[:1])
    finished_runs = trainer.end_train(prepared_runs)
    assert [r.id for r in finished_runs] == [r.id for r in prepared_runs]
    assert [r.status for r in finished_runs] == ["FINISHED", "FINISHED"]
    assert [line.split()[2] for line in log.read_text().splitlines()] == ["1.0", "2.0"]


@pytest.mark.slow
def test_delayed_failure_is_recorded_and_can_be_retried(make_task, tmp_path):
    trainer = DelayTrainerR("exp")
    prepared_runs = trainer.train(
        [make_task(record=[], fail="error"), make_task(record=[]), {"model": {}}]
    )
    assert [r.status for r in prepared_runs] == ["SCHEDULED", "SCHEDULED", "FAILED"]
    results = trainer.end_train(prepared_runs)
    assert [r.status for r in results] == ["FAILED", "FINISHED", "FAILED"]
    assert "this model fails" in results[0].list_tags()["error"]
    assert "dataset" in results[2].list_tags()["error"]
    results[0].save_objects(task=make_task(record=[]))
    (retried_run,) = trainer.end_train([results[0]])
    assert retried_run.status == "FINISHED"
    assert "error" not in retried_run.list_tags()


@pytest.mark.slow
def test_call_in_subproc_runs_each_task_in_its_own_process(
    session_fork_server, make_task, tmp_path
):
    log = tmp_path / "log"
    tasks = [
        make_task(record=[], value=1.0, log=str(log)),
        make_task(record=[], value=2.0, log=str(log), fail="error"),
        make_task(record=[], value=3.0, log=str(log), fail="kill"),
        make_task(record=[], value=4.0, log=str(log)),
    ]
    recorders = TrainerR("exp", call_in_subproc=True)(tasks)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [r.list_params()["model.kwargs.value"] for r in recorders] == [
        "1.0",
        "2.0",
        "3.0",
        "4.0",
    ]
    assert [r.status for r in recorders] == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert len({pid for pid, _, _ in lines} - {str(os.getpid())}) == 4
    # The parent of all children is the fork server.
    assert len({parent for _, parent, _ in lines} - {str(os.getpid())}) == 1
    assert "this model fails" in recorders[1].list_tags()["error"]
    assert "SIGKILL" in recorders[2].list_tags()["error"]
    expected = task_train(make_task(record=[]), "exp").list_metrics()["random_number"]
    assert recorders[0].list_metrics()["random_number"] == expected


@pytest.mark.slow
def test_delayed_trainer_with_call_in_subproc(session_fork_server, make_task):
    prepared_runs = [begin_task_train(make_task(record=[]), "exp")]
    prepared_runs[0].set_tags(train_status="begin_task_train")
    (finished_run,) = DelayTrainerR("exp", call_in_subproc=True).end_train(prepared_runs)
    assert finished_run.status == "FINISHED"


@pytest.mark.slow
def test_object_of_the_main_script_cannot_be_sent_to_a_subprocess(
    session_fork_server, make_task, monkeypatch
):
    class ScriptModel:
        pass

    ScriptModel.__module__, ScriptModel.__qualname__ = "__main__", "ScriptModel"
    monkeypatch.setattr(sys.modules["__main__"], "ScriptModel", ScriptModel, raising=False)
    task = {**make_task(record=[]), "model": ScriptModel()}
    (recorder,) = TrainerR("exp", call_in_subproc=True)([task])
    assert recorder.status == "FAILED"
    assert "'ScriptModel'" in recorder.list_tags()["error"]
