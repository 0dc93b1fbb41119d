"""Trainers that use a task pool."""

from __future__ import annotations

import pickle
import threading
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

import qtorch
from qtorch import R
from qtorch.core import secrets
from qtorch.core.errors import ConfigError, TaskDefinitionError, TaskError, TaskTimeout
from qtorch.task import TaskManager, run_task
from qtorch.tracking import Recorder
from qtorch.trainer import (
    DelayTrainerR,
    DelayTrainerRM,
    TrainerR,
    TrainerRM,
    begin_task_train,
    end_task_train,
    task_train,
)
from qtorch.trainer.failure import error_summary, record_failure
from qtorch.trainer.pooled import pool_definition

pytestmark = pytest.mark.slow  # Each waits for workers of a pool.


@pytest.fixture(autouse=True)
def url(tmp_path) -> str:
    """A temporary task pool, which is the session's default."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    qtorch.init(task_url=url)
    return url


def trainer_tags(recorder) -> dict[str, str]:
    return {k: v for k, v in recorder.list_tags().items() if k in ("train_status", TrainerRM.TM_ID)}


def test_all_trainers_give_bit_identical_predictions(make_task):
    tasks = [make_task(seed=s, value=v) for s, v in ((1, 0.5), (2, 1.5), (3, 2.5))]
    trainer_classes = [TrainerR, DelayTrainerR, TrainerRM, DelayTrainerRM]
    first_results = None
    for trainer_class in trainer_classes:
        recorders = trainer_class(trainer_class.__name__)(tasks)
        assert [r.list_params()["model.kwargs.value"] for r in recorders] == ["0.5", "1.5", "2.5"]
        results = [(r.load_object("pred.pkl"), r.list_metrics()) for r in recorders]
        assert [r.status for r in recorders] == ["FINISHED"] * 3
        assert {trainer_tags(r)["train_status"] for r in recorders} == {"end_task_train"}
        first_results = first_results or results
        for (pred, metrics), (expected, expected_metrics) in zip(
            results, first_results, strict=True
        ):
            pd.testing.assert_frame_equal(pred, expected, check_exact=True)
            assert metrics == expected_metrics


def test_empty_list_single_task_and_trainer_properties(make_task):
    trainer = TrainerRM("exp")
    assert trainer.train([]) == [] == trainer([])
    (recorder,) = trainer.train(make_task(record=[]))
    (task,) = TaskManager("exp").query({}, decode=False)
    assert trainer_tags(recorder) == {
        "train_status": "begin_task_train",
        TrainerRM.TM_ID: task["_id"],
    }
    assert trainer.end_train(recorder) == [recorder]
    assert trainer_tags(recorder)["train_status"] == "end_task_train"
    assert (trainer.is_delay(), trainer.has_worker()) == (False, True)
    assert (DelayTrainerRM("exp").is_delay(), DelayTrainerRM("exp").has_worker()) == (True, True)
    with pytest.raises(ConfigError, match="task_pool or an experiment_name"):
        TrainerRM().train(make_task())


def test_equal_task_is_not_trained_again(make_task, tmp_path):
    log = tmp_path / "log"
    tasks = [make_task(record=[], seed=None, value=v, log=str(log)) for v in (1.0, 2.0, 1.0)]
    recorders = TrainerRM("exp", "pool")(tasks)
    assert recorders[0] == recorders[2] != recorders[1]
    assert TrainerRM("exp", "pool")(tasks[:2]) == recorders[:2]
    assert len(log.read_text().splitlines()) == 2
    assert recorders[0].list_params()["seed"] != recorders[1].list_params()["seed"]


def test_finished_task_whose_data_cannot_be_compared_is_trained_again(
    make_task, tmp_path, monkeypatch, fakes, caplog
):
    monkeypatch.delattr(f"{fakes}.FakeDataset.fingerprint")
    log = tmp_path / "log"
    tasks = [make_task(record=[], value=v, log=str(log)) for v in (1.0, 2.0, 1.0)]
    waiting = TaskManager("pool").create_task([pool_definition(t, "exp") for t in tasks[:2]])
    recorders = TrainerRM("exp", "pool")(tasks)
    assert recorders[0] == recorders[2] != recorders[1]
    assert {r.list_tags()[TrainerRM.TM_ID] for r in recorders} == set(waiting)  # not done yet
    assert "trained again" not in caplog.text
    repeated_recorders = TrainerRM("exp", "pool")(tasks)
    assert repeated_recorders[0] == repeated_recorders[2] != repeated_recorders[1]
    assert not {r.id for r in recorders} & {r.id for r in repeated_recorders}
    assert "2 finished tasks of the pool are trained again" in caplog.text
    assert len(log.read_text().splitlines()) == 4


def test_failing_task_is_tried_three_times_without_affecting_others(make_task, tmp_path, caplog):
    log = tmp_path / "log"
    values = [0.1, 0.2, 0.3]
    tasks = [
        make_task(record=[], value=v, fail="error" if v == 0.2 else None, log=str(log))
        for v in values
    ]
    recorders = TrainerRM("exp", default_rec_name="r")([*tasks, {"model": {}}])
    assert [r.status for r in recorders] == ["FINISHED", "FAILED", "FINISHED", "FAILED"]
    assert [trainer_tags(r).get("train_status") for r in recorders[:3]] == [
        "end_task_train",
        None,
        "end_task_train",
    ]
    assert {r.name for r in recorders} == {"r"}
    assert "this model fails" in recorders[1].list_tags()["error"]
    assert "dataset" in recorders[3].list_tags()["error"]
    attempts = [line.split()[2] for line in log.read_text().splitlines()]
    assert sorted(attempts) == ["0.1", "0.2", "0.2", "0.2", "0.3"]
    assert len(R.list_recorders(experiment_name="exp")) == 4
    assert any(m.startswith("2 of 4 tasks failed") for m in caplog.messages)


def test_live_object_is_rejected_before_tasks_are_submitted(make_task):
    from qtorch.core.instantiate import init_instance_by_config

    live_task = {**make_task(), "reweighter": object()}
    with pytest.raises(TaskDefinitionError, match=r"reweighter is a live object"):
        TrainerRM("exp").train([make_task(), live_task])
    assert TaskManager("exp").task_stat() == {}
    # An object that is Configured is stored as its configuration.
    model = init_instance_by_config(make_task(record=[])["model"])
    assert TrainerRM("exp")([{**make_task(record=[]), "model": model}])[0].status == "FINISHED"


def test_delayed_trainer_leaves_part_done_tasks(make_task, tmp_path):
    log = tmp_path / "log"
    trainer = DelayTrainerRM("exp")
    tasks = [make_task(record=[], value=v, log=str(log)) for v in (1.0, 2.0)]
    prepared_runs = trainer.train(tasks)
    assert [r.status for r in prepared_runs] == ["SCHEDULED", "SCHEDULED"]
    assert not log.exists()
    assert TaskManager("exp").task_stat() == {"part_done": 2}
    trainer.end_train(prepared_runs[:1])
    finished_runs = trainer.end_train(prepared_runs)
    assert [r.id for r in finished_runs] == [r.id for r in prepared_runs]
    assert [r.status for r in finished_runs] == ["FINISHED", "FINISHED"]
    assert len(log.read_text().splitlines()) == 2
    assert [r.id for r in trainer(tasks)] == [r.id for r in prepared_runs]


def test_delayed_failure_is_returned_as_a_failed_run(make_task):
    trainer = DelayTrainerRM("exp")
    recorders = trainer([make_task(record=[], fail="error"), make_task(record=[]), {"model": {}}])
    assert [r.status for r in recorders] == ["FAILED", "FINISHED", "FAILED"]
    assert "this model fails" in recorders[0].list_tags()["error"]


def test_skip_run_task_waits_for_workers(make_task):
    trainer = TrainerRM("exp", skip_run_task=True)
    tasks = [make_task(record=[], value=v) for v in (1.0, 2.0)]
    recorders: list[Recorder] = []
    thread = threading.Thread(target=lambda: recorders.extend(trainer(tasks)))
    thread.start()
    manager = TaskManager("exp")
    while manager.task_stat() != {"waiting": 2}:
        thread.join(0.05)
        assert thread.is_alive()
    assert trainer.worker() is True
    thread.join(20)
    assert [r.list_params()["model.kwargs.value"] for r in recorders] == ["1.0", "2.0"]
    assert trainer.worker() is False


def test_tasks_removed_from_the_pool_are_reported(make_task):
    trainer = DelayTrainerRM("exp", "pool")
    prepared_runs = trainer.train([make_task(record=[], value=v) for v in (1.0, 2.0)])
    (id, _) = (trainer_tags(r)[TrainerRM.TM_ID] for r in prepared_runs)
    TaskManager("pool").remove({"_id": id})
    with pytest.raises(TaskError, match=f"1 of 2 tasks are not in the pool 'pool' any more: {id}"):
        trainer.end_train(prepared_runs)


def test_worker_of_a_delayed_trainer_fits_prepared_runs(make_task):
    prepared_runs = DelayTrainerRM("exp").train(make_task(record=[]))
    assert DelayTrainerRM("exp").worker() is True
    assert (
        DelayTrainerRM("exp", skip_run_task=True).end_train(prepared_runs)[0].status == "FINISHED"
    )


def test_tracking_location_is_stored_in_the_pool_only(make_task, tmp_path):
    task = make_task(record=[])
    trainer = TrainerRM("exp", "pool", skip_run_task=True, default_rec_name="mine")
    with pytest.raises(TaskTimeout):
        _submit_without_running(trainer, task)
    (stored_task,) = TaskManager("pool").query({}, decode=False)
    tracking = stored_task["def"]["tracking"]
    assert len(tracking.pop("inputs")) == 32
    assert tracking == {"experiment_name": "exp", "recorder_name": "mine", "uri": R.get_uri()}
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/elsewhere.db")
    assert run_task("qtorch.trainer.run.task_train", "pool") is True
    recorder = TaskManager("pool").re_query(stored_task["_id"])["res"]
    assert (recorder.name, recorder.uri) == ("mine", tracking["uri"])
    assert recorder.load_object("task") == task
    assert not [p for p in recorder.list_params() if p.startswith("tracking")]
    with pytest.raises(ConfigError, match="Did you mean 'recorder_name'"):
        task_train({**task, "tracking": {"recorder_nam": "x"}})


def test_pool_and_runs_contain_no_secrets(make_task, tmp_path, store, monkeypatch):
    """The worker completes the task's URL from its own environment, whatever name it has there."""
    full, stored = "postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"
    task = make_task(record=[], fail=full)
    with R.uri_context("http://me:s3cret@host:5000"):
        definition = pool_definition(task, "exp")
    assert definition["tracking"]["uri"] == "http://me:***@host:5000"
    with pytest.raises(TaskTimeout):
        _submit_without_running(TrainerRM("exp", "pool", skip_run_task=True), task)
    secrets._urls.clear()  # as in another process
    assert run_task("qtorch.trainer.run.task_train", "pool") is True
    (pool_task,) = TaskManager("pool").query({}, decode=False)
    assert f"task.model.kwargs.fail is {stored}, stored without its" in pool_task["error"]
    monkeypatch.setenv("MARKET_DATABASE", full)
    TaskManager("pool").reset_status({}, "waiting")
    run_task("qtorch.trainer.run.task_train", "pool")
    (pool_task,) = TaskManager("pool").query({})
    recorder = pool_task["res"]
    assert recorder.load_object("task")["model"]["kwargs"]["fail"] == stored
    load_model = partial(recorder.load_object, "params.pkl", unpickler=pickle.Unpickler)
    assert load_model().fail == full
    prepared_run = begin_task_train(task, "exp")
    ended_run = end_task_train(prepared_run)
    assert ended_run.load_object("params.pkl", unpickler=pickle.Unpickler).fail == full
    # A pickle of a user's own object contains whatever the object does.
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pickle"]
    assert len(files) > 5
    assert not [p for p in files if b"s3cret" in p.read_bytes()]


def test_errors_in_pool_and_run_contain_no_secrets(make_task, tmp_path, monkeypatch):
    def fail(task, experiment_name=None):
        raise ValueError("no answer from http://me:s3cret@host") from KeyError("x://s3cret:a@b")

    TaskManager("pool", max_errors=1).create_task([{"a": 1}])
    run_task(fail, "pool")
    (pool_task,) = TaskManager("pool").query({})
    assert "http://me:***@host" in pool_task["error"]
    assert "x://s3cret:***@b" in pool_task["traceback"]
    with pytest.raises(ValueError, match="no answer"), R.start(experiment_name="e"):
        recorder = R.get_recorder()
        error = ValueError("no answer from http://me:s3cret@host")
        record_failure(recorder, error)
        assert "s3cret" not in error_summary(error)  # of log lines and tables
        raise error
    assert recorder.list_tags()["error"] == "ValueError: no answer from http://me:***@host"
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in files if b"me:s3cret" in p.read_bytes()]


def _submit_without_running(trainer: TrainerRM, task) -> None:
    """Submit a task as a process does that is killed while it waits."""
    manager = trainer.manager()
    ids = trainer._submit_tasks(manager, [task], "exp")
    manager.wait({"_id": {"$in": ids}}, timeout=0.01)


def test_task_train_resumes_the_run_of_an_earlier_attempt(make_task):
    prepared_run = begin_task_train(make_task(record=[]), "exp")
    run = {
        "experiment_id": prepared_run.experiment_id,
        "recorder_id": prepared_run.id,
        "tracking_uri": prepared_run.uri,
    }
    finished_run = task_train(make_task(record=[]), "other", run=run)
    assert (finished_run.id, finished_run.status) == (prepared_run.id, "FINISHED")
    metrics = finished_run.list_metrics()
    failing_task = make_task(record=[], fail="error")
    returned_run = task_train(failing_task, "exp", run=run)  # already finished, so unchanged
    assert (returned_run.id, returned_run.list_metrics()) == (prepared_run.id, metrics)
    assert len(R.list_recorders(experiment_name="exp")) == 1


def test_resumed_run_keeps_its_random_seed(make_task):
    with pytest.raises(ValueError, match="this model fails"):
        task_train(make_task(seed=None, record=[], fail="error"), "exp")
    (failed_run,) = R.list_recorders(experiment_name="exp").values()
    seed = failed_run.load_object("task")["seed"]
    run = {"experiment_id": failed_run.experiment_id, "recorder_id": failed_run.id}
    finished_run = task_train(make_task(seed=None, record=[]), "exp", run=run)
    assert (finished_run.id, finished_run.load_object("task")["seed"]) == (failed_run.id, seed)
    assert "error" not in finished_run.list_tags()


def test_missing_run_is_replaced_by_a_new_one(make_task, caplog):
    run = {"experiment_id": "1", "recorder_id": "0123456789abcdef0123456789abcdef"}
    assert task_train(make_task(record=[]), "exp", run=run).status == "FINISHED"
    assert any("no longer exists" in m for m in caplog.messages)


def test_task_whose_workers_all_die_gets_a_failed_run(make_task, tmp_path):
    """After too many lost leases the pool fails the task, and the trainer closes its open run."""
    trainer = TrainerRM("exp", skip_run_task=True)
    manager = trainer.manager()
    (task_id,) = trainer._submit_tasks(manager, [make_task(record=[])], "exp")
    open_run = begin_task_train(make_task(record=[]), "exp")
    task = manager.fetch_task()
    manager.renew(task, run={"experiment_id": open_run.experiment_id, "recorder_id": open_run.id})
    manager.fail_task(task, "lost its lease 20 times")
    (recorder,) = trainer(make_task(record=[]))
    assert (recorder.id, recorder.status) == (open_run.id, "FAILED")
    assert "lost its lease" in recorder.list_tags()["error"]
    assert task_id == task["_id"]
    assert Path(recorder.download_artifact("error.txt")).exists()


def test_force_release_runs_each_task_in_a_separate_process(make_task, tmp_path):
    log = tmp_path / "log"
    fails = [None, "kill"]
    tasks = [make_task(record=[], value=k, fail=f, log=str(log)) for k, f in enumerate(fails)]
    recorders = TrainerRM("exp", force_release=True)(tasks)
    assert [r.status for r in recorders] == ["FINISHED", "FAILED"]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _, _ in lines}) == len(lines) == 1 + 3
    assert "SIGKILL" in recorders[1].list_tags()["error"]
    expected = task_train(make_task(record=[], value=0), "exp").list_metrics()["random_number"]
    assert recorders[0].list_metrics()["random_number"] == expected
