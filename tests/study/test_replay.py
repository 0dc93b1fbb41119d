"""A run repeated from its own record: equal where nothing changed, else told what did."""

from __future__ import annotations

import copy
import sys

import pandas as pd
import pytest

from qtorch import R, init
from qtorch.core.errors import ConfigError
from qtorch.study.replay import OF_TAG, Difference, differences, replay_run
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
    assert held["format"] == 2
    assert {"torch", "numpy", "pyarrow", "hydra-core", "qtorch"} <= held["packages"].keys()
    assert held["sources"] == {}  # all of it is qtorch's
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
    assert "no record of its environment" in found.unknown[0]


OWN = """
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
def own_network(tmp_path, monkeypatch):
    """A network of the user's own, `own_net.Net`, which needs the module `own_parts`."""
    (tmp_path / "own_net.py").write_text(OWN)
    (tmp_path / "own_parts.py").write_text("def halved(x):\n    return x / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    init(trusted=["own_net"])
    yield {"_target_": "own_net.Net"}
    for name in ("own_net", "own_parts"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_what_differs_is_named(made, own_network, tmp_path):
    run = made(lambda task: task["model"].update(network=own_network))
    held = run.load_object("environment")
    assert held["sources"].keys() == {"own_net", "own_parts"}
    (tmp_path / "own_parts.py").write_text("def halved(x):\n    return x / 2.5\n")
    held["packages"] = {**held["packages"], "torch": "1.0"}
    run.save_objects(environment={**held, "code": {"commit": "abc"}})
    run.save_objects(**{"pred.pkl": pd.DataFrame(run.load_object("pred.pkl")) + 0.25})
    found = replay_run(run.id)
    assert {"torch", "code.commit", "source of own_parts"} <= {d.what for d in found.differences}
    assert "source of own_net" not in {d.what for d in found.differences}
    assert not found.unknown
    scores = found.numbers[2]
    assert (scores.equal, "largest difference 0.25" in scores.told) == (False, True)
    assert not found.equal


def test_what_is_not_known_is_not_said_to_be_the_same():
    held = {"packages": {"torch": "2"}, "sources": {"mine": "ab"}, "data": "cd", "format": 2}
    assert differences(held, held) == ([], [])
    for then, told in (
        ({**held, "data": None}, "the data"),
        ({**held, "sources": None}, "the code of the task's own modules"),
        ({**held, "sources": {"mine": None}}, "source of mine"),
        ({"packages": {}, "data": "cd", "format": 1}, "the code of the task's own modules, torch"),
    ):
        for pair in ((then, held), (held, then), (then, then)):
            found, (unknown,) = differences(*pair)
            assert found == []
            assert unknown.endswith(f"as then: {told}") or pair == (then, then)
    gone = differences({**held, "packages": {}}, held)
    assert gone == ([Difference("torch", None, "2")], [])


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
