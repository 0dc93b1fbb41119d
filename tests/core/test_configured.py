"""Objects that remember their constructor's arguments, and the identities of tasks."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.configured import Configured, plain_value
from qtorch.core.errors import ArgumentError, ConfigError, TrustError
from qtorch.core.identity import canonical_json, digest, fit_id, task_id
from qtorch.core.serial import Serializable


class Component(Serializable, Configured):
    def __init__(self, a: int, b: object = None, *, segments: object = None) -> None:
        self.a, self.b, self.segments = a, b, segments
        self._cache = "heavy"


def test_to_config_returns_the_arguments_as_plain_data():
    component = Component(
        1,
        b=functools.partial(torch.optim.Adam, lr=0.1),
        segments={"train": (pd.Timestamp("2020-01-02"), "2020-12-31"), "n": np.int64(3)},
    )
    assert component.to_config() == {
        "_target_": f"{__name__}.Component",
        "a": 1,
        "b": {"_target_": "torch.optim.adam.Adam", "_partial_": True, "lr": 0.1},
        "segments": {"train": ["2020-01-02", "2020-12-31"], "n": 3},
    }
    assert Component(2, b=component).to_config()["b"] == component.to_config()


def test_to_config_rejects_a_live_object_and_names_the_argument():
    with pytest.raises(ConfigError, match=r"Component\.b is a live DataFrame"):
        Component(1, b=pd.DataFrame()).to_config()


def test_unknown_argument_suggests_the_nearest_name():
    with pytest.raises(ArgumentError, match="Did you mean 'segments'"):
        Component(1, segmnts=2)
    with pytest.raises(TypeError):
        Component()


def test_pickle_keeps_the_configuration_and_drops_private_state(tmp_path):
    component = pickle.loads(pickle.dumps(Component(1, b=2)))
    assert component.to_config() == Component(1, b=2).to_config()
    assert not hasattr(component, "_cache")
    full = Component(1)
    full.config(dump_all=True)
    assert pickle.loads(pickle.dumps(full))._cache == "heavy"
    full.config(dump_all=False, include=["_cache"], exclude=["a"])
    copy = pickle.loads(pickle.dumps(full))
    assert copy._cache == "heavy"
    assert not hasattr(copy, "a")


def test_load_rejects_an_object_of_another_class(tmp_path):
    path = tmp_path / "component.pkl"
    Component(1).to_pickle(path)
    assert Component.load(path, trusted_pickle=True).a == 1
    with pytest.raises(TrustError, match="trusted_pickle"):
        Component.load(path)

    class OtherClass(Serializable):
        pass

    with pytest.raises(TypeError, match="contains a Component"):
        OtherClass.load(path, trusted_pickle=True)
    with pytest.raises(ArgumentError, match="Did you mean 'dump_all'"):
        Component(1).to_pickle(path, dump_al=True)


def test_recursive_config_applies_to_serializable_attributes():
    inner = Component(1)
    outer = Component(2, b=inner)
    inner.b = outer  # a reference cycle must not recurse forever
    outer.config(dump_all=True, recursive=True)
    assert inner._is_pickled("_cache")


def test_equal_tasks_have_equal_identities():
    first = {"model": {"_target_": "a.B", "x": (1, 2)}, "seed": 1}
    second = {"seed": 1, "model": {"class": "B", "module_path": "a", "kwargs": {"x": [1, 2]}}}
    assert canonical_json(first) == canonical_json(second)
    assert task_id(first) == task_id(second) == digest(second)
    assert task_id({**first, "seed": 2}) != task_id(first)
    with pytest.raises(ConfigError, match="cannot represent"):
        canonical_json({"a": float("nan")})


def test_password_does_not_change_the_id():
    urls = ("mysql://me:first@host/db", "mysql://me:s/econd@host/db", "mysql://me:***@host/db")
    assert len({task_id({"a": {"url": url}, "b": "x@y"}) for url in urls}) == 1
    assert task_id({"a": {"url": "mysql://me:first@host/db2"}}) != task_id({"a": {"url": urls[0]}})


def test_fit_id_ignores_settings_that_do_not_change_results():
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


def test_plain_value_rejects_lambdas():
    with pytest.raises(ConfigError, match="cannot be imported by name"):
        plain_value(lambda: 0)
