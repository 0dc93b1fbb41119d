"""A study's trials: how many there are whoever asks, and what happens when one of them dies."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from qtorch.core.errors import ConfigError
from qtorch.tracking.trials.place import storage_url
from qtorch.tracking.trials.running import RunningTrial
from qtorch.tracking.trials.space import Choice, Span
from qtorch.tracking.trials.study import MAX_RETRIES, Trials

SPACE = {"lr": Span(1e-4, 1e-2, log=True), "size": Choice(("8", "16"))}


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A database with Optuna's tables: making them takes longer than a test."""
    path = tmp_path_factory.mktemp("study") / "empty.db"
    Trials("none", f"sqlite:///{path}")
    return path


@pytest.fixture
def url(tmp_path, empty) -> str:
    shutil.copy(empty, tmp_path / "study.db")
    return f"sqlite:///{tmp_path / 'study.db'}"


def drawn(study: Trials, number: int) -> list[dict]:
    found = []
    for _ in range(number):
        trial = study.ask(SPACE, number)
        assert trial is not None
        study.tell(trial, trial.params["lr"])
        found.append(trial.params)
    return found


def test_where_the_trials_lie_goes_with_the_tracking_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage_url(None, "sqlite:////x/mlflow.db") == "sqlite:////x/mlflow-optuna.db"
    assert storage_url(None, "http://h:5000") == f"sqlite:///{tmp_path}/mlruns/optuna.db"
    made = storage_url(None, "postgresql+psycopg://u:p@h/db?host=/s")
    assert made == "postgresql+psycopg://u:p@h/db?host=/s&options=-csearch_path%3Doptuna"
    assert storage_url("sqlite:///s.db", "http://h") == f"sqlite:///{tmp_path}/s.db"
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.storage="):
        storage_url(None, "mysql://u:secret@h/db")


@pytest.mark.slow
def test_a_study_that_is_stopped_and_opened_again_draws_what_it_would_have(url):
    whole = drawn(Trials("a", url, seed=3), 3)
    begun = drawn(Trials("b", url, seed=3), 2)
    again = Trials("b", url, seed=3).ask(SPACE, 3)
    assert [*begun, again.params] == whole
    assert len({str(p) for p in whole}) == 3


def test_no_more_are_given_out_than_asked_for(url):
    study = Trials("a", url, seed=0)
    first, second = study.ask(SPACE, 2), study.ask(SPACE, 2)
    assert study.ask(SPACE, 2) is None
    study.fail(first, "out of memory", run_id="r1")
    assert study.ask(SPACE, 2) is None  # a failed job counts
    study.give_back(second)
    third = study.ask(SPACE, 2)
    assert (third.number, third.params) == (2, second.params)
    study.tell(third, 0.5)
    assert [(r.state, r.error, r.retry_of) for r in study.rows()] == [
        ("FAIL", "out of memory", None),
        ("FAIL", "interrupted, run again", None),
        ("COMPLETE", None, 1),
    ]
    assert study.counted() == 2
    assert not study.has_work(2)


def test_the_trial_of_a_process_that_was_killed_is_run_again(url):
    pid = os.fork()
    if pid == 0:
        try:
            Trials("a", url, seed=0).ask(SPACE, 1)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    study = Trials("a", url, seed=0)
    assert study.running() == 1
    trial = study.ask(SPACE, 1)
    assert (trial.number, study.rows()[0].params) == (1, trial.params)
    assert study.ask(SPACE, 1) is None


def test_a_process_that_is_killed_while_it_asks_leaves_nothing_behind(url, monkeypatch):
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(
            "qtorch.tracking.trials.study.this_process",
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        )
        Trials("a", url, sampler="grid").ask({"size": SPACE["size"]}, 2)
    os.waitpid(pid, 0)
    study = Trials("a", url, sampler="grid")
    assert study.running() == 1
    asked = [study.ask({"size": SPACE["size"]}, 2) for _ in range(2)]
    assert sorted(t.params["size"] for t in asked) == ["16", "8"]
    assert study.ask({"size": SPACE["size"]}, 2) is None


def test_what_failed_is_run_again_if_asked(url):
    study = Trials("a", url, seed=0)
    first, second, lost = (study.ask(SPACE, 3) for _ in range(3))
    study.fail(first, "out of memory", run_id="r1")
    study.tell(second, 0.5)
    for _ in range(MAX_RETRIES + 1):
        study.give_back(lost)
        lost = study.ask(SPACE, 3) or lost
    assert study.counted() == 3
    assert study.retry_failed() == 2
    assert study.counted() == 1  # those that are run again count no longer
    assert study.retry_failed() == 0
    again, other = study.ask(SPACE, 3), study.ask(SPACE, 3)
    assert study.ask(SPACE, 3) is None
    assert (again.params, other.params) == (first.params, lost.params)
    assert (again.retry, other.retry, second.retry) == (True, True, False)
    study.give_back(again, lost=False)
    again = study.ask(SPACE, 3)
    assert again.retry  # its run is a failed one still
    study.tell(again, 0.7, run_id="r1")
    study.fail(other, "out of memory")
    rows = study.rows()
    assert [r.number for r in rows if not r.replaced] == [1, other.number, again.number]
    assert (rows[0].state, rows[0].error) == ("FAIL", "out of memory")
    assert rows[again.number].retry_of == first.number
    assert study.counted() == 3
    assert not study.has_work(3)


def test_one_that_takes_its_process_down_each_time_is_given_up(url):
    study = Trials("a", url, seed=0)
    for _ in range(MAX_RETRIES + 1):
        study.give_back(study.ask(SPACE, 1))
    assert study.ask(SPACE, 1) is None
    assert study.counted() == 1
    assert study.rows()[-1].error == "its process was lost each time"


def test_one_that_is_stopped_in_order_is_run_again_however_often(url):
    study = Trials("a", url, seed=0)
    for _ in range(MAX_RETRIES + 1):
        assert study.give_back(study.ask(SPACE, 1), lost=False)
    assert study.counted() == 0
    assert study.give_back(study.ask(SPACE, 1))


def test_who_was_taken_for_dead_tells_nothing(url, caplog):
    study = Trials("a", url, seed=0)
    late = study.ask(SPACE, 1)
    study.give_back(late)
    again = study.ask(SPACE, 1)
    study.tell(late, 9.0)
    assert "given to another process" in caplog.text
    study.tell(again, 0.5)
    assert [r.value for r in study.rows()] == [None, 0.5]


def test_the_median_pruner_stops_what_falls_behind(url):
    study = Trials("a", url, seed=0, pruner="median")
    running = RunningTrial("a", 0, url, "median")
    for level in range(5):
        trial = study.ask(SPACE, 6)
        running.id = trial.id
        assert not running.should_stop(0, 0.1 + level)
        study.tell(trial, 0.1 + level)
    running.id = study.ask(SPACE, 6).id
    assert running.should_stop(0, 2.05)
    assert (running.pruner, study.rows()[5].steps) == ("MedianPruner", 1)
    assert study.importances().keys() == SPACE.keys()


def test_a_pruned_trial_is_no_finished_one(url):
    always = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 0.0}
    study = Trials("a", url, seed=0, pruner=always)
    trial = study.ask(SPACE, 1)
    running = RunningTrial("a", trial.id, url, always)
    assert not running.should_stop(0, 0.5)
    assert running.should_stop(1, -0.5)
    study.tell(trial, 0.7)
    assert [(r.state, r.value, r.steps) for r in study.rows()] == [("PRUNED", -0.5, 2)]
    equal = study.ask(SPACE, 3)
    study.tell(equal, 0.7, pruned=True)  # was given the pruned run of an equal trial
    killed = study.ask(SPACE, 3)
    RunningTrial("a", killed.id, url, always).should_stop(0, -0.5)
    study.give_back(killed)  # stopped by its pruner, and then interrupted
    study.tell(study.ask(SPACE, 3), 0.7)
    assert [r.state for r in study.rows()] == ["PRUNED", "PRUNED", "FAIL", "PRUNED"]


def test_a_grid_is_walked_once(url):
    space = {"a": Choice(("x", "y")), "b": Span(1, 2, integer=True)}
    study = Trials("a", url, sampler="grid", seed=0)
    found = []
    for _ in range(4):
        trial = study.ask(space, 4)
        found.append(tuple(trial.params.values()))
        study.tell(trial, 0.0)
    assert sorted(found) == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]


def test_what_is_wrong_is_told(url):
    with pytest.raises(ConfigError, match="Did you mean 'median'"):
        Trials("a", url, pruner="meadian")
    with pytest.raises(ConfigError, match="Did you mean 'maximize'"):
        Trials("a", url, direction="maximise")
    with pytest.raises(ConfigError, match="Did you mean 'tpe'"):
        Trials("a", url, sampler="tpr").ask(SPACE, 1)
    with pytest.raises(ConfigError, match="lr is an interval"):
        Trials("a", url, sampler="grid").ask(SPACE, 1)
    Trials("a", url)
    with pytest.raises(ConfigError, match="asked for is to minimize"):
        Trials("a", url, direction="minimize")
    study = Trials("b", url)
    study.tell(study.ask(SPACE, 9), 1.0)
    with pytest.raises(ConfigError, match="another space"):
        study.ask({**SPACE, "size": Choice(("8", "99"))}, 9)
    with pytest.raises(ConfigError, match="cannot be used"):
        Trials("a", "nosuch://place")
