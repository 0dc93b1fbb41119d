"""One job of a sweep: what earlier runs have done of it counts."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from qtorch.core.errors import ConfigError
from qtorch.core.heartbeat import listening
from qtorch.study import sweep_job
from qtorch.study.claim import claimed
from qtorch.study.sweep import claim_path
from qtorch.study.sweep_job import (
    FIT_FROM_TAG,
    RECORDED,
    REFUSED,
    RESUMED,
    SKIPPED,
    TRAINED,
    Membership,
    has_settled_jobs,
    identified,
    run_sweep_job,
    settled_sweep_job,
)
from qtorch.tracking.r import R

PLACE = Membership("the-sweep", 0, ("seed=1",))
AGAIN = Membership("the-sweep", 0, ("seed=1",), retry=True)


def interrupted_by(stage: str):
    """Inside, the work is interrupted where it comes to `stage`."""

    def on_beat(name: str, details: dict) -> None:
        if name == stage:
            raise KeyboardInterrupt

    return listening(on_beat)


@pytest.mark.slow
def test_records_that_were_interrupted_are_made_without_training(store, make_task, monkeypatch):
    task = {**make_task(), "seed": 1}
    fitted = run_sweep_job(task, PLACE, "exp")
    assert fitted.how == TRAINED
    other = {**task, "record": ["SignalRecord"]}
    monkeypatch.setattr("qtorch.core.heartbeat.PAUSE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), interrupted_by("record"):
        run_sweep_job(other, PLACE, "exp")
    (killed,) = [
        r for r in R.list_recorders(experiment_name="exp").values() if r.status == "KILLED"
    ]
    assert killed.list_tags()[FIT_FROM_TAG] == fitted.recorder.id

    monkeypatch.setattr(sweep_job, "task_train", None)  # whoever trains fails
    made = run_sweep_job(other, PLACE, "exp")
    assert made.how == RESUMED
    assert (made.recorder.id, made.recorder.status) == (killed.id, "FINISHED")
    assert made.recorder.logged("valid/loss") == fitted.recorder.logged("valid/loss")
    assert "pred.pkl" in made.recorder.list_artifacts()
    third = run_sweep_job({**task, "record": []}, PLACE, "exp")
    assert third.how == RECORDED


@pytest.mark.slow
def test_a_record_that_failed_is_mended_without_training(store, make_task, monkeypatch):
    task = {**make_task(), "seed": 1}
    with pytest.raises(ConfigError, match="NoSuchRecord"):
        run_sweep_job({**task, "record": ["NoSuchRecord"]}, PLACE, "exp")
    (failed,) = R.list_recorders(experiment_name="exp").values()
    assert failed.status == "FAILED"
    alone = Membership(PLACE.sweep_id, 0, PLACE.overrides, reuse=False)
    elsewhere = Membership("another", 0, PLACE.overrides, reuse=False)

    train = sweep_job.task_train
    monkeypatch.setattr(sweep_job, "task_train", None)  # whoever trains fails
    with pytest.raises(TypeError):
        run_sweep_job(task, elsewhere, "exp")
    made = run_sweep_job(task, alone, "exp")
    assert (made.how, made.recorder.status) == (RECORDED, "FINISHED")
    assert made.recorder.list_tags()[FIT_FROM_TAG] == failed.id
    assert made.recorder.logged("valid/loss") == failed.logged("valid/loss")

    # A record's own failure to load something is no reason to train.
    other = {**task, "record": ["SigAnaRecord"]}  # of scores that no record has made
    with pytest.raises(Exception, match=r"pred\.pkl"):
        run_sweep_job(other, alone, "exp")

    # What cannot be loaded is passed over, be it all that there is.
    for run in R.list_recorders(experiment_name="exp").values():
        Path(run.download_artifact("params.pkl")).unlink()
    monkeypatch.setattr(sweep_job, "task_train", train)
    assert run_sweep_job({**task, "record": []}, alone, "exp").how == TRAINED


@pytest.mark.slow
def test_what_is_settled_is_known_without_doing_it(store, make_task):
    task = {**make_task(), "seed": 1, "record": []}
    assert not has_settled_jobs("exp")
    assert settled_sweep_job(task, PLACE, "exp") is None
    bad = {**task, "model": {**task["model"], "network": "qtorch.nn.NoSuchNetwork"}}
    with pytest.raises(Exception, match="NoSuchNetwork"):
        run_sweep_job(bad, PLACE, "exp")
    assert has_settled_jobs("exp")
    refused = settled_sweep_job(bad, PLACE, "exp")
    assert (refused.how, refused.recorder.status) == (REFUSED, "FAILED")
    assert "sweep.retry=true" in refused.error
    assert settled_sweep_job(bad, AGAIN, "exp") is None
    with pytest.raises(Exception, match="NoSuchNetwork"):
        run_sweep_job(bad, AGAIN, "exp")
    assert len(R.list_recorders(experiment_name="exp")) == 1  # tried again in its run

    done = run_sweep_job(task, PLACE, "exp")
    found = settled_sweep_job(task, Membership("another", 3, ("seed=1",)), "exp")
    assert (found.how, found.recorder.id, found.error) == (SKIPPED, done.recorder.id, None)
    only_own = Membership("a-third", 3, ("seed=1",), reuse=False)
    assert settled_sweep_job(task, only_own, "exp") is None


@pytest.mark.slow
def test_a_claim_that_is_given_up_before_its_run_began_is_taken(
    store, make_task, monkeypatch, caplog
):
    """Who holds it may read data for minutes before there is a run, and fail in that."""
    task = {**make_task(), "seed": 1, "record": []}
    held = claim_path(R.get_exp(experiment_name="exp").id, identified(task)[1])
    waits = threading.Event()

    def sleep(seconds: float) -> None:
        assert not R.list_recorders(experiment_name="exp")
        waits.set()

    def hold() -> None:
        with claimed(held) as mine:
            assert mine
            holds.set()
            assert waits.wait(60)

    holds = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(60)
    monkeypatch.setattr(sweep_job, "time", SimpleNamespace(sleep=sleep))
    with caplog.at_level("INFO", "qtorch"):
        done = run_sweep_job(task, PLACE, "exp")
    holder.join()
    assert waits.is_set()
    assert (done.how, done.recorder.status) == (TRAINED, "FINISHED")
    assert len([r for r in caplog.records if "about to begin this job" in r.getMessage()]) == 1
