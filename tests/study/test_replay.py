"""A run repeated from its own record: equal where nothing changed, else told what did."""

from __future__ import annotations

import copy

import pandas as pd
import pytest

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.study.replay import OF_TAG, replay_run
from qtorch.trainer.run import task_train


@pytest.fixture
def made(store, make_task):
    """`made(change)`: a finished run; `change` works on its task."""

    def make(change=lambda task: None):
        task = copy.deepcopy(make_task(epochs=2))
        change(task)
        return task_train(task, "replayed", "first")

    return make


def on_a_table(path):
    """A change of a task: its data come from a file."""

    def change(task) -> None:
        task["dataset"]["handler"]["source"] = {
            "_target_": "qtorch.data.TableSource",
            "path": str(path),
        }
        task["dataset"]["handler"]["instruments"] = "all"

    return change


@pytest.mark.slow
def test_a_run_replayed_is_equal_and_says_of_what(made):
    run = made()
    held = run.load_object("environment")
    assert held["format"] == 1
    assert {"torch", "numpy", "qtorch"} <= held["packages"].keys()
    assert len(held["data"]) == 32
    found = replay_run(run.id)
    assert found.equal
    assert [n.equal for n in found.numbers] == [True, True, True]
    assert found.differences == []
    assert found.run.list_tags()[OF_TAG] == run.id
    assert found.run.experiment_id == run.experiment_id


@pytest.mark.slow
def test_other_data_are_told_as_other_data(made, make_task, tmp_path):
    from qtorch.core.instantiate import init_instance_by_config

    path = tmp_path / "bars.parquet"
    source = make_task()["dataset"]["handler"]["source"]
    frame = init_instance_by_config(source).load().to_frame().reset_index()
    frame.to_parquet(path, index=False)
    run = made(on_a_table(path))
    frame.loc[frame.index[1000], "close"] *= 1.5
    frame.to_parquet(path, index=False)
    found = replay_run(run.id)
    assert not found.equal
    assert [d.what for d in found.differences] == ["data"]
    assert found.differences[0].then == run.load_object("environment")["data"]
    assert {n.what for n in found.numbers if n.equal is False} >= {"metrics", "predictions"}


@pytest.mark.slow
def test_a_run_without_an_environment_is_replayed_and_said_so(made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qtorch.trainer.run.save_environment", lambda *given: None)
        run = made()
    found = replay_run(run.id)
    assert found.equal
    assert "before environments were recorded" in found.unknown[0]


@pytest.mark.slow
def test_what_differs_is_named(made):
    run = made()
    held = run.load_object("environment")
    held["packages"] = {**held["packages"], "torch": "1.0"}
    run.save_objects(environment={**held, "code": {"commit": "abc"}})
    run.save_objects(**{"pred.pkl": pd.DataFrame(run.load_object("pred.pkl")) + 0.25})
    found = replay_run(run.id)
    assert {"torch", "code.commit"} <= {d.what for d in found.differences}
    scores = found.numbers[2]
    assert (scores.equal, "largest difference 0.25" in scores.told) == (False, True)
    assert not found.equal


def test_a_run_that_cannot_be_replayed_says_why(store):
    with R.start(experiment_name="replayed"):
        R.log_metrics(x=1.0)
        bare = R.get_recorder()
    with pytest.raises(ConfigError, match="holds no task"):
        replay_run(bare.id)
    with pytest.raises(ZeroDivisionError), R.start(experiment_name="replayed"):
        failed = R.get_recorder()
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="is FAILED; only a finished run"):
        replay_run(failed.id)


@pytest.mark.slow
def test_the_environment_costs_little_and_fails_nothing(made, monkeypatch):
    from qtorch.trainer import provenance

    monkeypatch.setattr(provenance, "environment_of", lambda *given: 1 / 0)
    assert made().status == "FINISHED"
