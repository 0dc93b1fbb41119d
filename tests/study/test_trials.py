"""A study shared by several processes: number of trials, retries, pruning and errors."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from hydra.core.override_parser.overrides_parser import OverridesParser

from qtorch.cli.launchers.optuna_sweeper import OptunaSweeper
from qtorch.core.errors import ConfigError
from qtorch.model.loop.callbacks import pruning_callbacks
from qtorch.study.search import study as study_module
from qtorch.study.search.study import MAX_RETRIES, RunningTrial, SharedStudy
from qtorch.study.search.trial import Choice, Span, storage_url
from qtorch.tracking.pruning import TRIAL_VARIABLE

SPACE = {"lr": Span(1e-4, 1e-2, log=True), "size": Choice(("8", "16"))}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """A database with Optuna's tables; creating them takes longer than a test."""
    path = tmp_path_factory.mktemp("study") / "empty.db"
    SharedStudy("none", f"sqlite:///{path}")
    return path


@pytest.fixture
def url(tmp_path, empty_database) -> str:
    shutil.copy(empty_database, tmp_path / "study.db")
    return f"sqlite:///{tmp_path / 'study.db'}"


def draw_params(study: SharedStudy, count: int) -> list[dict]:
    all_params = []
    for _ in range(count):
        trial = study.ask(SPACE, count)
        assert trial is not None
        study.tell(trial, trial.params["lr"])
        all_params.append(trial.params)
    return all_params


def test_storage_url_is_derived_from_the_tracking_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage_url(None, "sqlite:////x/mlflow.db") == "sqlite:////x/mlflow-optuna.db"
    assert storage_url(None, "http://h:5000") == f"sqlite:///{tmp_path}/mlruns/optuna.db"
    url = storage_url(None, "postgresql+psycopg://u:p@h/db?host=/s")
    assert url == "postgresql+psycopg://u:p@h/db?host=/s&options=-csearch_path%3Doptuna"
    assert storage_url("sqlite:///s.db", "http://h") == f"sqlite:///{tmp_path}/s.db"
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.storage="):
        storage_url(None, "mysql://u:secret@h/db")


@pytest.mark.slow
def test_reopened_study_draws_the_same_parameters(url):
    all_params = draw_params(SharedStudy("a", url, seed=3), 3)
    first_params = draw_params(SharedStudy("b", url, seed=3), 2)
    last_trial = SharedStudy("b", url, seed=3).ask(SPACE, 3)
    assert [*first_params, last_trial.params] == all_params
    assert len({str(p) for p in all_params}) == 3


def test_number_of_trials_is_limited(url):
    study = SharedStudy("a", url, seed=0)
    first, second = study.ask(SPACE, 2), study.ask(SPACE, 2)
    assert study.ask(SPACE, 2) is None
    study.fail(first, "out of memory", run_id="r1")
    assert study.ask(SPACE, 2) is None  # a failed job counts
    study.requeue(second)
    third = study.ask(SPACE, 2)
    assert (third.number, third.params) == (2, second.params)
    study.tell(third, 0.5)
    assert [(r.state, r.error, r.retry_of) for r in study.rows()] == [
        ("FAIL", "out of memory", None),
        ("FAIL", "interrupted, run again", None),
        ("COMPLETE", None, 1),
    ]
    assert study.num_final_trials() == 2
    assert not study.has_work(2)


def test_trial_of_a_killed_process_is_retried(url):
    pid = os.fork()
    if pid == 0:
        try:
            SharedStudy("a", url, seed=0).ask(SPACE, 1)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    study = SharedStudy("a", url, seed=0)
    assert study.num_running() == 1
    trial = study.ask(SPACE, 1)
    assert (trial.number, study.rows()[0].params) == (1, trial.params)
    assert study.ask(SPACE, 1) is None


def test_owner_of_a_trial_in_the_format_of_earlier_versions(url):
    study = SharedStudy("a", url, seed=0)
    trial = study.ask(SPACE, 1)
    owner = {**study_module._current_owner(), "host": socket.gethostname()}
    study._storage.set_trial_user_attr(trial.id, study_module.PROCESS, owner)
    assert not study.has_work(1)
    study._storage.set_trial_user_attr(trial.id, study_module.PROCESS, {**owner, "start": "1"})
    assert study.has_work(1)


def test_process_killed_while_asking_loses_no_trial(url, monkeypatch):
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(
            "qtorch.study.search.study._current_owner",
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        )
        SharedStudy("a", url, sampler="grid").ask({"size": SPACE["size"]}, 2)
    os.waitpid(pid, 0)
    study = SharedStudy("a", url, sampler="grid")
    assert study.num_running() == 1
    trials = [study.ask({"size": SPACE["size"]}, 2) for _ in range(2)]
    assert sorted(t.params["size"] for t in trials) == ["16", "8"]
    assert study.ask({"size": SPACE["size"]}, 2) is None


def test_failed_trials_are_retried_on_request(url):
    study = SharedStudy("a", url, seed=0)
    first, second, interrupted_trial = (study.ask(SPACE, 3) for _ in range(3))
    study.fail(first, "out of memory", run_id="r1")
    study.tell(second, 0.5)
    for _ in range(MAX_RETRIES + 1):
        study.requeue(interrupted_trial)
        interrupted_trial = study.ask(SPACE, 3) or interrupted_trial
    assert study.num_final_trials() == 3
    assert study.retry_failed_trials() == 2
    assert study.num_final_trials() == 1  # trials that are queued again no longer count
    assert study.retry_failed_trials() == 0
    first_retry, second_retry = study.ask(SPACE, 3), study.ask(SPACE, 3)
    assert study.ask(SPACE, 3) is None
    assert (first_retry.params, second_retry.params) == (first.params, interrupted_trial.params)
    assert (first_retry.retry, second_retry.retry, second.retry) == (True, True, False)
    study.requeue(first_retry, count_retry=False)
    first_retry = study.ask(SPACE, 3)
    assert first_retry.retry  # its run is still marked as failed
    study.tell(first_retry, 0.7, run_id="r1")
    study.fail(second_retry, "out of memory")
    rows = study.rows()
    assert [r.number for r in rows if not r.replaced] == [
        1,
        second_retry.number,
        first_retry.number,
    ]
    assert (rows[0].state, rows[0].error) == ("FAIL", "out of memory")
    assert rows[first_retry.number].retry_of == first.number
    assert study.num_final_trials() == 3
    assert not study.has_work(3)


def test_trial_that_kills_its_process_each_time_is_given_up(url):
    study = SharedStudy("a", url, seed=0)
    for _ in range(MAX_RETRIES + 1):
        study.requeue(study.ask(SPACE, 1))
    assert study.ask(SPACE, 1) is None
    assert study.num_final_trials() == 1
    assert study.rows()[-1].error == "its process died each time"


def test_orderly_stops_do_not_count_as_retries(url):
    study = SharedStudy("a", url, seed=0)
    for _ in range(MAX_RETRIES + 1):
        assert study.requeue(study.ask(SPACE, 1), count_retry=False)
    assert study.num_final_trials() == 0
    assert study.requeue(study.ask(SPACE, 1))


def test_late_result_of_a_replaced_trial_is_ignored(url, caplog):
    study = SharedStudy("a", url, seed=0)
    replaced_trial = study.ask(SPACE, 1)
    study.requeue(replaced_trial)
    retry = study.ask(SPACE, 1)
    study.tell(replaced_trial, 9.0)
    assert "taken over by another process" in caplog.text
    study.tell(retry, 0.5)
    assert [r.value for r in study.rows()] == [None, 0.5]


def test_median_pruner_stops_a_bad_trial(url):
    study = SharedStudy("a", url, seed=0, pruner="median")
    running = RunningTrial("a", 0, url, "median")
    for level in range(5):
        trial = study.ask(SPACE, 6)
        running.id = trial.id
        assert not running.should_stop(0, 0.1 + level)
        study.tell(trial, 0.1 + level)
    running.id = study.ask(SPACE, 6).id
    assert running.should_stop(0, 2.05)
    assert (running.pruner_name, study.rows()[5].steps) == ("MedianPruner", 1)
    assert study.importances().keys() == SPACE.keys()


def test_pruned_trials_are_not_complete(url):
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 0.0}
    study = SharedStudy("a", url, seed=0, pruner=pruner)
    trial = study.ask(SPACE, 1)
    running = RunningTrial("a", trial.id, url, pruner)
    assert not running.should_stop(0, 0.5)
    assert running.should_stop(1, -0.5)
    study.tell(trial, 0.7)
    assert [(r.state, r.value, r.steps) for r in study.rows()] == [("PRUNED", -0.5, 2)]
    equal_trial = study.ask(SPACE, 3)
    study.tell(equal_trial, 0.7, has_pruned_run=True)  # reused the pruned run of an equal trial
    interrupted_trial = study.ask(SPACE, 3)
    RunningTrial("a", interrupted_trial.id, url, pruner).should_stop(0, -0.5)
    study.requeue(interrupted_trial)  # pruned, then interrupted
    study.tell(study.ask(SPACE, 3), 0.7)
    assert [r.state for r in study.rows()] == ["PRUNED", "PRUNED", "FAIL", "PRUNED"]


def test_job_of_a_trial_builds_its_judge_from_the_environment(url, monkeypatch):
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 0.0}
    study = SharedStudy("""it's "\\ hére""", url, seed=0, pruner=pruner)
    sweeper = OptunaSweeper(
        metric="IC", direction="maximize", n_trials=1, n_jobs=1, sampler="tpe", seed=0,
        pruner=pruner, report="valid/rank_ic", study_name=None, storage=url, grace=60, params=None,
    )  # fmt: skip
    trial = study.ask(SPACE, 1)
    (override,) = OverridesParser.create().parse_overrides(sweeper._pruning_overrides(study, trial))
    monkeypatch.setenv(TRIAL_VARIABLE, str(override.value()))
    (callback,) = pruning_callbacks(None)
    assert (callback.metric, callback.trial.pruner_name) == ("valid/rank_ic", "ThresholdPruner")
    assert callback.trial.should_stop(0, -0.5)
    assert study.is_pruned(trial)


def test_grid_sampler_visits_each_point_once(url):
    space = {"a": Choice(("x", "y")), "b": Span(1, 2, integer=True)}
    study = SharedStudy("a", url, sampler="grid", seed=0)
    points = []
    for _ in range(4):
        trial = study.ask(space, 4)
        points.append(tuple(trial.params.values()))
        study.tell(trial, 0.0)
    assert sorted(points) == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]


def test_error_messages(url):
    with pytest.raises(ConfigError, match="Did you mean 'median'"):
        SharedStudy("a", url, pruner="meadian")
    with pytest.raises(ConfigError, match="Did you mean 'maximize'"):
        SharedStudy("a", url, direction="maximise")
    with pytest.raises(ConfigError, match="Did you mean 'tpe'"):
        SharedStudy("a", url, sampler="tpr").ask(SPACE, 1)
    with pytest.raises(ConfigError, match="lr is an interval"):
        SharedStudy("a", url, sampler="grid").ask(SPACE, 1)
    SharedStudy("a", url)
    with pytest.raises(ConfigError, match="not minimize"):
        SharedStudy("a", url, direction="minimize")
    study = SharedStudy("b", url)
    study.tell(study.ask(SPACE, 9), 1.0)
    with pytest.raises(ConfigError, match="another search space"):
        study.ask({**SPACE, "size": Choice(("8", "99"))}, 9)
    with pytest.raises(ConfigError, match="cannot open the study"):
        SharedStudy("a", "nosuch://place")
