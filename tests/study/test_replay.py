"""Tests of replays: equal results if nothing changed, otherwise a report of what did."""

from __future__ import annotations

import copy
import sys

import pandas as pd
import pytest

from qtorch import R, init
from qtorch.core.errors import ConfigError
from qtorch.study.replay import (
    REPLAY_OF_TAG,
    Difference,
    Guarantee,
    Replay,
    ResultCheck,
    _compare_metrics,
    _compare_scores,
    compare_environments,
    find_guarantee,
    replay_run,
)
from qtorch.trainer.run import task_train


@pytest.fixture
def make_run(store, make_task):
    """`make_run(change)`: a finished run whose task was modified by `change`."""

    def make(change=lambda task: None):
        task = copy.deepcopy(make_task(epochs=2))
        change(task)
        return task_train(task, "replayed", "first")

    return make


def use_table_source(path):
    """A `change` that makes the task read its data from a file."""

    def change(task) -> None:
        task["dataset"]["handler"]["source"] = {
            "_target_": "qtorch.data.TableSource",
            "path": str(path),
        }
        task["dataset"]["handler"]["instruments"] = "all"

    return change


GPU = {"device": "cuda:0", "deterministic": True}


@pytest.mark.parametrize(
    ("environment", "changed", "kind", "reason"),
    [
        ({"device": "cpu"}, [], "bit-equal", "the same kind of CPU"),
        (GPU, [], "bit-equal", "deterministic=true"),
        ({**GPU, "deterministic": False}, [], "tolerance", "without trainer.deterministic=true"),
        (GPU, ["device_name", "torch"], "tolerance", "changed: device_name and torch"),
        ({"device": "cpu"}, ["threads"], "tolerance", "changed: threads"),
        (GPU, ["data", "torch"], "none", "changed: data"),
        (GPU, ["code.commit"], "none", "changed: code.commit"),
        (GPU, ["source of own_net"], "none", "changed: source of own_net"),
        ({}, [], "none", "unknown"),
    ],
)
def test_guarantee_of_an_environment(environment, changed, kind, reason):
    differences = [Difference(name, "a", "b") for name in changed]
    guarantee = find_guarantee(environment, differences, [])
    assert guarantee.kind == kind
    assert reason.replace(" and ", ", ") in guarantee.reason
    assert find_guarantee(environment, differences, ["the data is unknown"]).kind == "none"


@pytest.mark.parametrize(
    ("checks", "strongest"),
    [
        ([(True, False), (None, False)], "bit-equal"),
        ([(True, False), (False, True)], "tolerance"),
        ([(False, True), (False, False)], "none"),
        ([(None, False)], "none"),
    ],
)
def test_strongest_guarantee_that_results_keep(checks, strongest):
    results = [ResultCheck("weights", equal, "", is_close) for equal, is_close in checks]
    for kind in ("bit-equal", "tolerance", "none"):
        replay = Replay(None, None, results, [], [], Guarantee(kind, ""))
        assert replay.strongest_guarantee == strongest
        assert replay.is_kept == (strongest == "bit-equal" or strongest == kind == "tolerance")


def test_scores_that_differ_by_less_than_a_hundredth_of_their_spread_are_close(store):
    runs = []
    for change in (0.0, 0.005, 0.5):
        with R.start(experiment_name="scores"):
            runs.append(R.get_recorder())
            scores = pd.DataFrame({"score": [0.0, 1.0 + change, 2.0]})
            runs[-1].save_objects(**{"pred.pkl": scores})
    checks = [_compare_scores(runs[0], run) for run in runs[1:]]
    assert [(check.equal, check.is_close) for check in checks] == [(False, True), (False, False)]


@pytest.mark.parametrize(
    ("left", "right", "equal", "detail"),
    [
        ({"a": [1.0, None]}, {"a": [1.0, None]}, True, "2 scores, bit for bit"),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.5]}, False, "2 scores, largest difference 0.5"),
        ({"a": [1.0]}, {"a": [1.0], "b": [1.0]}, False, "columns: 1 originally, 2 now"),
        ({"a": [None]}, {"a": [1.0]}, False, "difference 0, 1 missing"),
    ],
)
def test_scores_are_compared_with_their_missing_values(store, left, right, equal, detail):
    runs = []
    for scores in (left, right):
        with R.start(experiment_name="scores"):
            runs.append(R.get_recorder())
            runs[-1].save_objects(**{"pred.pkl": pd.DataFrame(scores, dtype=float)})
    check = _compare_scores(*runs)
    assert check.equal is equal
    assert detail in check.detail


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ({"IC": 0.1, "report.turnover": 1.0}, {"IC": 0.1}, True),  # reported after the training
        ({"IC": 0.1, "report.turnover": 1.0}, {"IC": 0.1, "report.turnover": 2.0}, False),
        ({"IC": 0.1, "report.turnover": 1.0}, {"IC": 0.2}, False),
        ({"IC": 0.1}, {}, False),
    ],
)
def test_metrics_of_a_later_report_are_not_compared(store, left, right, equal):
    runs = []
    for metrics in (left, right):
        with R.start(experiment_name="metrics"):
            runs.append(R.get_recorder())
            runs[-1].log_metrics(**metrics)
    assert _compare_metrics(*runs).equal is equal


@pytest.mark.slow
def test_replay_of_unchanged_run_is_equal(make_run):
    run = make_run()
    environment = run.load_object("environment")
    assert environment["format"] == 2
    assert {"torch", "numpy", "pyarrow", "hydra-core", "qtorch"} <= environment["packages"].keys()
    assert environment["sources"] == {}  # the task uses only qtorch's classes
    assert len(environment["data"]) == 32
    replay = replay_run(run.id)
    assert replay.equal
    assert [n.equal for n in replay.checks] == [True, True, True]
    assert replay.differences == []
    assert replay.guarantee.kind == replay.strongest_guarantee == "bit-equal"
    assert replay.run.list_tags()["replay.guarantee"] == "bit-equal"
    assert replay.run.list_tags()[REPLAY_OF_TAG] == run.id
    assert replay.run.experiment_id == run.experiment_id


@pytest.mark.slow
def test_changed_data_are_reported(make_run, make_task, tmp_path):
    from qtorch.core.instantiate import init_instance_by_config

    path = tmp_path / "bars.parquet"
    source = make_task()["dataset"]["handler"]["source"]
    frame = init_instance_by_config(source).load().to_frame().reset_index()
    frame.to_parquet(path, index=False)
    run = make_run(use_table_source(path))
    frame.loc[frame.index[1000], "close"] *= 1.5
    frame.to_parquet(path, index=False)
    replay = replay_run(run.id)
    assert not replay.equal
    assert [d.name for d in replay.differences] == ["data"]
    assert replay.guarantee == Guarantee("none", "changed: data")
    assert not replay.is_kept
    assert replay.differences[0].original == run.load_object("environment")["data"]
    assert {n.name for n in replay.checks if n.equal is False} >= {"metrics", "predictions"}


@pytest.mark.slow
def test_run_without_environment_is_replayed_with_note(make_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qtorch.trainer.run.save_environment", lambda *args: None)
        run = make_run()
    replay = replay_run(run.id)
    assert replay.equal
    assert "no record of its environment" in replay.unknown[0]
    assert (replay.guarantee.kind, replay.strongest_guarantee, replay.is_kept) == (
        "none",
        "bit-equal",
        True,
    )


NETWORK_SOURCE = """
from torch import nn
from own_parts import halved

class Net(nn.Module):
    def __init__(self, d_feat: int):
        super().__init__()
        self.head = nn.Linear(d_feat, 1)

    def forward(self, x):
        return halved(self.head(x))[:, 0]
"""


@pytest.fixture
def user_network(tmp_path, monkeypatch):
    """A network in a user's module, `own_net.Net`, which imports the module `own_parts`."""
    (tmp_path / "own_net.py").write_text(NETWORK_SOURCE)
    (tmp_path / "own_parts.py").write_text("def halved(x):\n    return x / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    init(trusted=["own_net"])
    yield {"_target_": "own_net.Net"}
    for name in ("own_net", "own_parts"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_differences_are_reported(make_run, user_network, tmp_path):
    run = make_run(lambda task: task["model"].update(network=user_network))
    environment_record = run.load_object("environment")
    assert environment_record["sources"].keys() == {"own_net", "own_parts"}
    (tmp_path / "own_parts.py").write_text("def halved(x):\n    return x / 2.5\n")
    environment_record["packages"] = {**environment_record["packages"], "torch": "1.0"}
    run.save_objects(environment={**environment_record, "code": {"commit": "abc"}})
    run.save_objects(**{"pred.pkl": pd.DataFrame(run.load_object("pred.pkl")) + 0.25})
    replay = replay_run(run.id)
    assert {"torch", "code.commit", "source of own_parts"} <= {d.name for d in replay.differences}
    assert "source of own_net" not in {d.name for d in replay.differences}
    assert not replay.unknown
    scores = replay.checks[2]
    assert (scores.equal, "largest difference 0.25" in scores.detail) == (False, True)
    assert not replay.equal


def test_unknown_parts_are_not_reported_as_equal():
    environment = {"packages": {"torch": "2"}, "sources": {"mine": "ab"}, "data": "cd", "format": 2}
    assert compare_environments(environment, environment) == ([], [])
    for original, description in (
        ({**environment, "data": None}, "the data"),
        ({**environment, "sources": None}, "the code of the task's own modules"),
        ({**environment, "sources": {"mine": None}}, "source of mine"),
        ({"packages": {}, "data": "cd", "format": 1}, "the code of the task's own modules, torch"),
    ):
        for pair in ((original, environment), (environment, original), (original, original)):
            differences, (unknown,) = compare_environments(*pair)
            assert differences == []
            assert unknown.endswith(f"different: {description}") or pair == (original, original)
    missing_package = compare_environments({**environment, "packages": {}}, environment)
    assert missing_package == ([Difference("torch", None, "2")], [])


def test_replay_of_unfinished_or_empty_run_raises(store):
    with R.start(experiment_name="replayed"):
        R.log_metrics(x=1.0)
        empty_run = R.get_recorder()
    with pytest.raises(ConfigError, match="has no task to repeat"):
        replay_run(empty_run.id)
    with pytest.raises(ZeroDivisionError), R.start(experiment_name="replayed"):
        failed_run = R.get_recorder()
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="is FAILED; only a finished run"):
        replay_run(failed_run.id)


@pytest.mark.slow
def test_failure_to_describe_environment_does_not_fail_the_run(make_run, monkeypatch):
    from qtorch.trainer import provenance

    monkeypatch.setattr(provenance, "describe_environment", lambda *args: 1 / 0)
    assert make_run().status == "FINISHED"
