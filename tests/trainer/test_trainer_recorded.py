"""The trainers of many tasks."""

from __future__ import annotations

import os
import sys

import pytest

from qtorch import R
from qtorch.tracking import Recorder
from qtorch.trainer import DelayTrainerR, TrainerR, begin_task_train, task_train


def tag(recorder):
    return recorder.list_tags().get("train_status")


def test_one_bare_task_and_none_at_all(make_task):
    trainer = TrainerR("exp")
    assert trainer.train([]) == []
    assert trainer([]) == []
    (recorder,) = trainer.train(make_task(record=[]))
    assert tag(recorder) == "begin_task_train"
    assert trainer.end_train(recorder) == [recorder]
    assert tag(recorder) == "end_task_train"
    assert (trainer.is_delay(), trainer.has_worker()) == (False, False)
    with pytest.raises(NotImplementedError, match="no workers"):
        trainer.worker()


def test_recorders_come_back_in_the_order_of_the_tasks_and_a_failing_one_takes_no_other_along(
    make_task, caplog
):
    values = [0.1, 0.2, 0.3]
    tasks = [make_task(record=[], value=v, fail="error" if v == 0.2 else None) for v in values]
    recorders = TrainerR("exp", default_rec_name="r")(tasks)
    assert [float(r.list_params()["model.kwargs.value"]) for r in recorders] == values
    assert [r.status for r in recorders] == ["FINISHED", "FAILED", "FINISHED"]
    assert [tag(r) for r in recorders] == ["end_task_train", None, "end_task_train"]
    assert {r.name for r in recorders} == {"r"}
    warned = [m for m in caplog.messages if m.startswith("1 of 3 tasks failed")]
    assert len(warned) == 1
    assert recorders[1].id in warned[0]
    assert "this model fails" in warned[0]


def test_a_task_that_is_none_has_a_failed_run_in_its_place(make_task):
    recorders = TrainerR("exp")([{"model": {}}, make_task(record=[])])
    assert [r.status for r in recorders] == ["FAILED", "FINISHED"]
    assert "dataset" in recorders[0].list_tags()["error"]


@pytest.mark.slow
def test_ctrl_c_ends_the_list(make_task):
    with pytest.raises(KeyboardInterrupt):
        TrainerR("exp")([make_task(fail="interrupt"), make_task()])
    (recorder,) = R.list_recorders(experiment_name="exp").values()
    assert recorder.status == Recorder.STATUS_K


def test_a_delayed_trainer_fits_in_end_train_and_skips_what_has_ended(make_task, tmp_path):
    log = tmp_path / "log"
    trainer = DelayTrainerR("exp")
    assert trainer.is_delay()
    begun = trainer.train([make_task(record=[], value=v, log=str(log)) for v in (1.0, 2.0)])
    assert [r.status for r in begun] == ["SCHEDULED", "SCHEDULED"]
    assert not log.exists()
    trainer.end_train(begun[:1])
    ended = trainer.end_train(begun)
    assert [r.id for r in ended] == [r.id for r in begun]
    assert [r.status for r in ended] == ["FINISHED", "FINISHED"]
    assert [line.split()[2] for line in log.read_text().splitlines()] == ["1.0", "2.0"]


@pytest.mark.slow
def test_a_delayed_failure_is_recorded_and_can_be_tried_again(make_task, tmp_path):
    trainer = DelayTrainerR("exp")
    begun = trainer.train([make_task(record=[], fail="error"), make_task(record=[]), {"model": {}}])
    assert [r.status for r in begun] == ["SCHEDULED", "SCHEDULED", "FAILED"]
    ended = trainer.end_train(begun)
    assert [r.status for r in ended] == ["FAILED", "FINISHED", "FAILED"]
    assert "this model fails" in ended[0].list_tags()["error"]
    assert "dataset" in ended[2].list_tags()["error"]
    ended[0].save_objects(task=make_task(record=[]))
    (again,) = trainer.end_train([ended[0]])
    assert again.status == "FINISHED"
    assert "error" not in again.list_tags()


@pytest.mark.slow
def test_call_in_subproc_gives_each_task_one_process(warm, make_task, tmp_path):
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
    assert len({parent for _, parent, _ in lines} - {str(os.getpid())}) == 1  # the zygote
    assert "this model fails" in recorders[1].list_tags()["error"]
    assert "SIGKILL" in recorders[2].list_tags()["error"]
    here = task_train(make_task(record=[]), "exp").list_metrics()["drawn"]
    assert recorders[0].list_metrics()["drawn"] == here


@pytest.mark.slow
def test_a_delayed_trainer_in_subprocesses(warm, make_task):
    begun = [begin_task_train(make_task(record=[]), "exp")]
    begun[0].set_tags(train_status="begin_task_train")
    (ended,) = DelayTrainerR("exp", call_in_subproc=True).end_train(begun)
    assert ended.status == "FINISHED"


@pytest.mark.slow
def test_an_object_of_the_script_itself_does_not_reach_a_process_of_its_own(
    warm, make_task, monkeypatch
):
    class Mine:
        pass

    Mine.__module__, Mine.__qualname__ = "__main__", "Mine"
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)
    task = {**make_task(record=[]), "model": Mine()}
    (recorder,) = TrainerR("exp", call_in_subproc=True)([task])
    assert recorder.status == "FAILED"
    assert "'Mine'" in recorder.list_tags()["error"]
