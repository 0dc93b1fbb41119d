"""The trainers that go through a pool."""

from __future__ import annotations

import threading
from pathlib import Path

import pandas as pd
import pytest

import qtorch
from qtorch import R
from qtorch.core.errors import ConfigError, TaskDefinitionError, TaskTimeout
from qtorch.task import TaskManager, run_task
from qtorch.tracking import Recorder
from qtorch.trainer import (
    DelayTrainerR,
    DelayTrainerRM,
    TrainerR,
    TrainerRM,
    begin_task_train,
    task_train,
)


@pytest.fixture(autouse=True)
def url(tmp_path) -> str:
    """A pool of this test's own, the default of its session."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    qtorch.init(task_url=url)
    return url


def tags(recorder) -> dict[str, str]:
    return {k: v for k, v in recorder.list_tags().items() if k in ("train_status", TrainerRM.TM_ID)}


@pytest.mark.slow
def test_the_four_ways_give_the_same_predictions_bit_for_bit(make_task):
    tasks = [make_task(seed=s, value=v) for s, v in ((1, 0.5), (2, 1.5), (3, 2.5))]
    ways = [TrainerR, DelayTrainerR, TrainerRM, DelayTrainerRM]
    first = None
    for way in ways:
        recorders = way(way.__name__)(tasks)
        assert [r.list_params()["model.kwargs.value"] for r in recorders] == ["0.5", "1.5", "2.5"]
        told = [(r.load_object("pred.pkl"), r.list_metrics()) for r in recorders]
        assert [r.status for r in recorders] == ["FINISHED"] * 3
        assert {tags(r)["train_status"] for r in recorders} == {"end_task_train"}
        first = first or told
        for (pred, metrics), (expected, its_metrics) in zip(told, first, strict=True):
            pd.testing.assert_frame_equal(pred, expected, check_exact=True)
            assert metrics == its_metrics


def test_bare_tasks_no_tasks_and_what_a_trainer_says_of_itself(make_task):
    trainer = TrainerRM("exp")
    assert trainer.train([]) == [] == trainer([])
    (recorder,) = trainer.train(make_task(record=[]))
    (task,) = TaskManager("exp").query({}, decode=False)
    assert tags(recorder) == {"train_status": "begin_task_train", TrainerRM.TM_ID: task["_id"]}
    assert trainer.end_train(recorder) == [recorder]
    assert tags(recorder)["train_status"] == "end_task_train"
    assert (trainer.is_delay(), trainer.has_worker()) == (False, True)
    assert (DelayTrainerRM("exp").is_delay(), DelayTrainerRM("exp").has_worker()) == (True, True)
    with pytest.raises(ConfigError, match="task_pool or an experiment_name"):
        TrainerRM().train(make_task())


def test_an_equal_task_is_not_trained_again(make_task, tmp_path):
    log = tmp_path / "log"
    tasks = [make_task(record=[], seed=None, value=v, log=str(log)) for v in (1.0, 2.0, 1.0)]
    one = TrainerRM("exp", "pool")(tasks)
    assert one[0] == one[2] != one[1]
    assert TrainerRM("exp", "pool")(tasks[:2]) == one[:2]
    assert len(log.read_text().splitlines()) == 2
    assert one[0].list_params()["seed"] != one[1].list_params()["seed"]


def test_a_failing_task_is_tried_thrice_in_its_run_and_takes_no_other_along(
    make_task, tmp_path, caplog
):
    log = tmp_path / "log"
    values = [0.1, 0.2, 0.3]
    tasks = [
        make_task(record=[], value=v, fail="error" if v == 0.2 else None, log=str(log))
        for v in values
    ]
    recorders = TrainerRM("exp", default_rec_name="r")([*tasks, {"model": {}}])
    assert [r.status for r in recorders] == ["FINISHED", "FAILED", "FINISHED", "FAILED"]
    assert [tags(r).get("train_status") for r in recorders[:3]] == [
        "end_task_train",
        None,
        "end_task_train",
    ]
    assert {r.name for r in recorders} == {"r"}
    assert "this model fails" in recorders[1].list_tags()["error"]
    assert "dataset" in recorders[3].list_tags()["error"]
    tried = [line.split()[2] for line in log.read_text().splitlines()]
    assert sorted(tried) == ["0.1", "0.2", "0.2", "0.2", "0.3"]
    assert len(R.list_recorders(experiment_name="exp")) == 4
    assert any(m.startswith("2 of 4 tasks failed") for m in caplog.messages)


def test_a_live_object_is_refused_before_anything_is_sent(make_task):
    from qtorch.core.instantiate import init_instance_by_config

    live = {**make_task(), "reweighter": object()}
    with pytest.raises(TaskDefinitionError, match=r"reweighter is a live object"):
        TrainerRM("exp").train([make_task(), live])
    assert TaskManager("exp").task_stat() == {}
    model = init_instance_by_config(make_task(record=[])["model"])  # describes itself
    assert TrainerRM("exp")([{**make_task(record=[]), "model": model}])[0].status == "FINISHED"


def test_a_delayed_trainer_prepares_here_and_leaves_part_done_tasks(make_task, tmp_path):
    log = tmp_path / "log"
    trainer = DelayTrainerRM("exp")
    tasks = [make_task(record=[], value=v, log=str(log)) for v in (1.0, 2.0)]
    begun = trainer.train(tasks)
    assert [r.status for r in begun] == ["SCHEDULED", "SCHEDULED"]
    assert not log.exists()
    assert TaskManager("exp").task_stat() == {"part_done": 2}
    trainer.end_train(begun[:1])
    ended = trainer.end_train(begun)
    assert [r.id for r in ended] == [r.id for r in begun]
    assert [r.status for r in ended] == ["FINISHED", "FINISHED"]
    assert len(log.read_text().splitlines()) == 2
    assert [r.id for r in trainer(tasks)] == [r.id for r in begun]


@pytest.mark.slow
def test_a_delayed_failure_comes_back_as_a_failed_run(make_task):
    trainer = DelayTrainerRM("exp")
    recorders = trainer([make_task(record=[], fail="error"), make_task(record=[]), {"model": {}}])
    assert [r.status for r in recorders] == ["FAILED", "FINISHED", "FAILED"]
    assert "this model fails" in recorders[0].list_tags()["error"]


def test_without_work_of_its_own_it_waits_for_workers(make_task):
    trainer = TrainerRM("exp", skip_run_task=True)
    tasks = [make_task(record=[], value=v) for v in (1.0, 2.0)]
    found: list[Recorder] = []
    waiting = threading.Thread(target=lambda: found.extend(trainer(tasks)))
    waiting.start()
    manager = TaskManager("exp")
    while manager.task_stat() != {"waiting": 2}:
        waiting.join(0.05)
        assert waiting.is_alive()
    assert trainer.worker() is True
    waiting.join(20)
    assert [r.list_params()["model.kwargs.value"] for r in found] == ["1.0", "2.0"]
    assert trainer.worker() is False


def test_a_delayed_trainers_worker_fits_what_is_prepared(make_task):
    begun = DelayTrainerRM("exp").train(make_task(record=[]))
    assert DelayTrainerRM("exp").worker() is True
    assert DelayTrainerRM("exp", skip_run_task=True).end_train(begun)[0].status == "FINISHED"


def test_the_place_of_a_run_is_in_the_pool_and_not_in_the_run(make_task, tmp_path):
    task = make_task(record=[])
    trainer = TrainerRM("exp", "pool", skip_run_task=True, default_rec_name="mine")
    with pytest.raises(TaskTimeout):
        _sent_only(trainer, task)
    (sent,) = TaskManager("pool").query({}, decode=False)
    place = sent["def"]["tracking"]
    assert place == {"experiment_name": "exp", "recorder_name": "mine", "uri": R.get_uri()}
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/elsewhere.db")
    assert run_task("qtorch.trainer.run.task_train", "pool") is True
    recorder = TaskManager("pool").re_query(sent["_id"])["res"]
    assert (recorder.name, recorder.uri) == ("mine", place["uri"])
    assert recorder.load_object("task") == task
    assert not [p for p in recorder.list_params() if p.startswith("tracking")]
    with pytest.raises(ConfigError, match="Did you mean 'recorder_name'"):
        task_train({**task, "tracking": {"recorder_nam": "x"}})


def _sent_only(trainer: TrainerRM, task) -> None:
    """What a process does that is killed while it waits."""
    manager = trainer.manager()
    ids = trainer._sent(manager, [task], "exp")
    manager.wait({"_id": {"$in": ids}}, timeout=0.01)


def test_a_run_that_is_given_is_taken_up_again(make_task):
    begun = begin_task_train(make_task(record=[]), "exp")
    run = {"experiment_id": begun.experiment_id, "recorder_id": begun.id, "tracking_uri": begun.uri}
    ended = task_train(make_task(record=[]), "other", run=run)
    assert (ended.id, ended.status) == (begun.id, "FINISHED")
    drawn = ended.list_metrics()
    again = task_train(make_task(record=[], fail="error"), "exp", run=run)  # finished: as it is
    assert (again.id, again.list_metrics()) == (begun.id, drawn)
    assert len(R.list_recorders(experiment_name="exp")) == 1


def test_a_drawn_seed_stays_the_runs(make_task):
    with pytest.raises(ValueError, match="this model fails"):
        task_train(make_task(seed=None, record=[], fail="error"), "exp")
    (failed,) = R.list_recorders(experiment_name="exp").values()
    seed = failed.load_object("task")["seed"]
    run = {"experiment_id": failed.experiment_id, "recorder_id": failed.id}
    ended = task_train(make_task(seed=None, record=[]), "exp", run=run)
    assert (ended.id, ended.load_object("task")["seed"]) == (failed.id, seed)
    assert "error" not in ended.list_tags()


def test_a_run_that_is_gone_is_replaced(make_task, caplog):
    run = {"experiment_id": "1", "recorder_id": "0123456789abcdef0123456789abcdef"}
    assert task_train(make_task(record=[]), "exp", run=run).status == "FINISHED"
    assert any("is gone" in m for m in caplog.messages)


def test_what_no_worker_survives_ends_as_a_failed_run(make_task, tmp_path):
    """The pool gives up after the last lost lease; the run that nobody could close is closed."""
    trainer = TrainerRM("exp", skip_run_task=True)
    manager = trainer.manager()
    (sent,) = trainer._sent(manager, [make_task(record=[])], "exp")
    begun = begin_task_train(make_task(record=[]), "exp")
    task = manager.fetch_task()
    manager.renew(task, run={"experiment_id": begun.experiment_id, "recorder_id": begun.id})
    manager.fail_task(task, "lost its lease 20 times")
    (recorder,) = trainer(make_task(record=[]))
    assert (recorder.id, recorder.status) == (begun.id, "FAILED")
    assert "lost its lease" in recorder.list_tags()["error"]
    assert sent == task["_id"]
    assert Path(recorder.download_artifact("error.txt")).exists()


@pytest.mark.slow
def test_each_task_in_a_process_of_its_own(make_task, tmp_path):
    log = tmp_path / "log"
    fails = [None, "kill"]
    tasks = [make_task(record=[], value=k, fail=f, log=str(log)) for k, f in enumerate(fails)]
    recorders = TrainerRM("exp", force_release=True)(tasks)
    assert [r.status for r in recorders] == ["FINISHED", "FAILED"]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _, _ in lines}) == len(lines) == 1 + 3
    assert "SIGKILL" in recorders[1].list_tags()["error"]
    here = task_train(make_task(record=[], value=0), "exp").list_metrics()["drawn"]
    assert recorders[0].list_metrics()["drawn"] == here
