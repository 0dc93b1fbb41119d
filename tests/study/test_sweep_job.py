"""Tests of running a sweep's job: the work of earlier runs is reused."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from qtorch.cli.jobs import work
from qtorch.core.errors import RecordError
from qtorch.process.heartbeat import listen
from qtorch.process.lease import hold_claim
from qtorch.study import sweep_job
from qtorch.study.sweep import _save_plan, claim_path, end_sweep, find_sweep, start_sweep
from qtorch.study.sweep_job import (
    FAILED_BEFORE,
    FIT_FROM_TAG,
    RECORDS_ONLY,
    RESUMED,
    SKIPPED,
    TRAINED,
    SweepMember,
    find_finished_job,
    has_finished_jobs,
    identify_task,
    run_sweep_job,
)
from qtorch.tracking.manager import R

MEMBER = SweepMember("the-sweep", 0, ("seed=1",))
RETRY_MEMBER = SweepMember("the-sweep", 0, ("seed=1",), retry=True)


def interrupt_at_stage(stage: str):
    """Within this context, raise KeyboardInterrupt when the work reaches `stage`."""

    def on_beat(name: str, details: dict) -> None:
        if name == stage:
            raise KeyboardInterrupt

    return listen(on_beat)


@pytest.mark.slow
def test_interrupted_records_are_resumed_without_training(store, make_task, monkeypatch):
    task = {**make_task(), "seed": 1}
    first_outcome = run_sweep_job(task, MEMBER, "exp")
    assert first_outcome.action == TRAINED
    other_task = {**task, "record": ["SignalRecord"]}
    monkeypatch.setattr("qtorch.process.heartbeat.PAUSE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), interrupt_at_stage("record"):
        run_sweep_job(other_task, MEMBER, "exp")
    (killed_run,) = [
        r for r in R.list_recorders(experiment_name="exp").values() if r.status == "KILLED"
    ]
    assert killed_run.list_tags()[FIT_FROM_TAG] == first_outcome.recorder.id

    monkeypatch.setattr(sweep_job, "task_train", None)  # any attempt to train fails
    outcome = run_sweep_job(other_task, MEMBER, "exp")
    assert outcome.action == RESUMED
    assert (outcome.recorder.id, outcome.recorder.status) == (killed_run.id, "FINISHED")
    assert outcome.recorder.metric_history("valid/loss") == first_outcome.recorder.metric_history(
        "valid/loss"
    )
    assert "pred.pkl" in outcome.recorder.list_artifacts()
    third_outcome = run_sweep_job({**task, "record": []}, MEMBER, "exp")
    assert third_outcome.action == RECORDS_ONLY


def test_training_of_a_single_command_is_reused_for_other_records(store, make_task, monkeypatch):
    task = {**make_task(), "seed": 1}
    monkeypatch.setattr(work, "job_task", lambda settings: task)
    monkeypatch.setattr(work, "task_definition", lambda settings: task)
    request = {"settings": {"experiment_name": "exp"}, "resume": None, "sweep": None}
    first_outcome = work._train_job({**request, "run_name": None})
    monkeypatch.setattr(sweep_job, "task_train", None)  # any attempt to train fails
    outcome = run_sweep_job({**task, "record": ["SignalRecord"]}, MEMBER, "exp")
    assert outcome.action == RECORDS_ONLY
    assert outcome.recorder.list_tags()[FIT_FROM_TAG] == first_outcome.recorder.id


@pytest.mark.slow
def test_failed_record_is_retried_without_training(store, make_task, monkeypatch):
    task = {**make_task(), "seed": 1}
    bad_record = {"_target_": "qtorch.record.SigAnaRecord", "label_col": 9}
    with pytest.raises(RecordError, match="label_col=9"):
        run_sweep_job({**task, "record": ["SignalRecord", bad_record]}, MEMBER, "exp")
    (failed_run,) = R.list_recorders(experiment_name="exp").values()
    assert failed_run.status == "FAILED"
    same_sweep = SweepMember(MEMBER.sweep_id, 0, MEMBER.overrides, reuse=False)
    other_sweep = SweepMember("another", 0, MEMBER.overrides, reuse=False)

    real_train = sweep_job.task_train
    monkeypatch.setattr(sweep_job, "task_train", None)  # any attempt to train fails
    with pytest.raises(TypeError):
        run_sweep_job(task, other_sweep, "exp")
    outcome = run_sweep_job(task, same_sweep, "exp")
    assert (outcome.action, outcome.recorder.status) == (RECORDS_ONLY, "FINISHED")
    assert outcome.recorder.list_tags()[FIT_FROM_TAG] == failed_run.id
    assert outcome.recorder.metric_history("valid/loss") == failed_run.metric_history("valid/loss")

    # If a record itself fails to load an artifact, the job must not train again.
    other_task = {**task, "record": ["SigAnaRecord"]}  # needs scores, which no record stored
    with pytest.raises(Exception, match=r"pred\.pkl"):
        run_sweep_job(other_task, same_sweep, "exp")

    # Runs whose model cannot be loaded are ignored, even if there are no others.
    for run in R.list_recorders(experiment_name="exp").values():
        Path(run.download_artifact("params.pkl")).unlink()
    monkeypatch.setattr(sweep_job, "task_train", real_train)
    assert run_sweep_job({**task, "record": []}, same_sweep, "exp").action == TRAINED


@pytest.mark.slow
def test_finished_and_failed_jobs_are_found_without_running(store, make_task):
    task = {**make_task(), "seed": 1, "record": []}
    assert not has_finished_jobs("exp")
    assert find_finished_job(task, MEMBER, "exp") is None
    bad_task = {**task, "model": {**task["model"], "network": "qtorch.nn.NoSuchNetwork"}}
    with pytest.raises(Exception, match="NoSuchNetwork"):
        run_sweep_job(bad_task, MEMBER, "exp")
    assert has_finished_jobs("exp")
    failed_outcome = find_finished_job(bad_task, MEMBER, "exp")
    assert (failed_outcome.action, failed_outcome.recorder.status) == (FAILED_BEFORE, "FAILED")
    assert "sweep.retry=true" in failed_outcome.error
    assert find_finished_job(bad_task, RETRY_MEMBER, "exp") is None
    with pytest.raises(Exception, match="NoSuchNetwork"):
        run_sweep_job(bad_task, RETRY_MEMBER, "exp")
    assert len(R.list_recorders(experiment_name="exp")) == 1  # retried in the same run

    outcome = run_sweep_job(task, MEMBER, "exp")
    skipped_outcome = find_finished_job(task, SweepMember("another", 3, ("seed=1",)), "exp")
    assert (skipped_outcome.action, skipped_outcome.recorder.id, skipped_outcome.error) == (
        SKIPPED,
        outcome.recorder.id,
        None,
    )
    without_reuse = SweepMember("a-third", 3, ("seed=1",), reuse=False)
    assert find_finished_job(task, without_reuse, "exp") is None


@pytest.mark.slow
def test_job_waits_for_claim_whose_holder_has_no_run_yet(store, make_task, monkeypatch, caplog):
    """The holder of a claim may load data for minutes before its run starts, and fail there."""
    task = {**make_task(), "seed": 1, "record": []}
    path = claim_path(R.get_exp(experiment_name="exp").id, identify_task(task)[1])
    is_waiting = threading.Event()

    def sleep(seconds: float) -> None:
        assert not R.list_recorders(experiment_name="exp")
        is_waiting.set()

    def hold() -> None:
        with hold_claim(path) as has_claim:
            assert has_claim
            is_holding.set()
            assert is_waiting.wait(60)

    is_holding = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert is_holding.wait(60)
    monkeypatch.setattr(sweep_job, "time", SimpleNamespace(sleep=sleep))
    with caplog.at_level("INFO", "qtorch"):
        outcome = run_sweep_job(task, MEMBER, "exp")
    holder.join()
    assert is_waiting.is_set()
    assert (outcome.action, outcome.recorder.status) == (TRAINED, "FINISHED")
    assert len([r for r in caplog.records if "has claimed this job" in r.getMessage()]) == 1


def test_sweep_with_a_quotation_mark_in_its_name_is_continued(store):
    ids = []
    for _ in range(2):
        recorder = start_sweep("alice's", "quoted", ["seed=0,1"], overrides=["seed=0,1"])
        end_sweep(recorder)
        ids.append(recorder.id)
    assert ids[0] == ids[1]
    assert find_sweep("alice's").id == ids[0]


def test_sweep_that_continues_with_other_data_says_so(store, caplog):
    table = {"_target_": "qtorch.data.TableSource", "path": "csv"}
    for data, overrides in [(table, ["seed=0"]), (table, ["seed=1"])]:
        start_sweep("lrs", "exp", overrides, overrides=overrides, data=data).end_run()
    assert "other data" not in caplog.text
    start_sweep("lrs", "exp", ["seed=2"], overrides=["seed=2"], data={**table, "path": "new"})
    assert "the sweep lrs has been started with other data (data.path: csv before, new now)" in (
        caplog.text
    )


def test_plan_of_a_sweep_has_no_password():
    stored: dict = {}
    recorder = SimpleNamespace(
        uri="http://me:s3cret@host",
        list_artifacts=list,
        save_objects=lambda **objects: stored.update(objects),
    )
    _save_plan(recorder, {"words": ["seed=1"], "told": ["seed=1"]}, {"folder": "x"})
    assert stored["sweep"]["tracking_uri"] == "http://me:***@host"
