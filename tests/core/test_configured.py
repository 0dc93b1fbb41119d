from __future__ import annotations

import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.configured import Configured, plain_value
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.identity import canonical_json, digest, fit_id, task_id
from qtorch.core.serial import Serializable


class Thing(Serializable, Configured):
    def __init__(self, a: int, b: object = None, *, segments: object = None) -> None:
        self.a, self.b, self.segments = a, b, segments
        self._cache = "heavy"


def test_arguments_come_back_as_plain_data():
    thing = Thing(
        1,
        b=functools.partial(torch.optim.Adam, lr=0.1),
        segments={"train": (pd.Timestamp("2020-01-02"), "2020-12-31"), "n": np.int64(3)},
    )
    assert thing.to_config() == {
        "_target_": f"{__name__}.Thing",
        "a": 1,
        "b": {"_target_": "torch.optim.adam.Adam", "_partial_": True, "lr": 0.1},
        "segments": {"train": ["2020-01-02", "2020-12-31"], "n": 3},
    }
    assert Thing(2, b=thing).to_config()["b"] == thing.to_config()


def test_a_live_object_has_no_configuration_and_says_where():
    with pytest.raises(ConfigError, match=r"Thing\.b is a live DataFrame"):
        Thing(1, b=pd.DataFrame()).to_config()


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'segments'"):
        Thing(1, segmnts=2)
    with pytest.raises(TypeError):
        Thing()


def test_pickle_keeps_the_configuration_and_drops_private_state(tmp_path):
    thing = pickle.loads(pickle.dumps(Thing(1, b=2)))
    assert thing.to_config() == Thing(1, b=2).to_config()
    assert not hasattr(thing, "_cache")
    whole = Thing(1)
    whole.config(dump_all=True)
    assert pickle.loads(pickle.dumps(whole))._cache == "heavy"
    whole.config(dump_all=False, include=["_cache"], exclude=["a"])
    again = pickle.loads(pickle.dumps(whole))
    assert again._cache == "heavy"
    assert not hasattr(again, "a")


def test_load_refuses_another_class(tmp_path, monkeypatch):
    class_path = tmp_path / "thing.pkl"
    monkeypatch.setenv("QTORCH_TRUSTED", __name__.split(".")[0])
    Thing(1).to_pickle(class_path)
    assert Thing.load(class_path).a == 1

    class Other(Serializable):
        pass

    with pytest.raises(TypeError, match="holds a Thing"):
        Other.load(class_path)
    with pytest.raises(ArgumentError, match="Did you mean 'dump_all'"):
        Thing(1).to_pickle(class_path, dump_al=True)


def test_recursive_config_reaches_parts():
    inner = Thing(1)
    outer = Thing(2, b=inner)
    inner.b = outer  # a cycle ends
    outer.config(dump_all=True, recursive=True)
    assert inner._is_kept("_cache")


def test_equal_tasks_have_equal_identities():
    one = {"model": {"_target_": "a.B", "x": (1, 2)}, "seed": 1}
    two = {"seed": 1, "model": {"class": "B", "module_path": "a", "kwargs": {"x": [1, 2]}}}
    assert canonical_json(one) == canonical_json(two)
    assert task_id(one) == task_id(two) == digest(two)
    assert task_id({**one, "seed": 2}) != task_id(one)
    with pytest.raises(ConfigError, match="no form"):
        canonical_json({"a": float("nan")})


def test_fit_id_ignores_what_changes_no_number():
    def task(record="r", source="here", bar=True, epochs=3):
        return {
            "model": {
                "_target_": "M",
                "trainer": {"max_epochs": epochs, "enable_progress_bar": bar},
            },
            "dataset": {"_target_": "D", "handler": {"_target_": "H", "source": source}},
            "record": record,
        }

    base = fit_id(task(), "data")
    assert base == fit_id(task(record="s", source="there", bar=False), "data")
    assert base != fit_id(task(epochs=4), "data")
    assert base != fit_id(task(), "other data")


def test_plain_value_refuses_lambdas():
    with pytest.raises(ConfigError, match="no importable name"):
        plain_value(lambda: 0)
