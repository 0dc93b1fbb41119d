"""`init_instance_by_config` and the other functions that read configurations."""

from __future__ import annotations

import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from omegaconf import OmegaConf

from qtorch.core import instantiate as inst
from qtorch.core.configured import Configured
from qtorch.core.errors import ArgumentError, ConfigError, TrustError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.core.trust import as_stored_text

HERE = __name__


class Part(Configured):
    def __init__(self, size: int = 1, *, extra: object = None) -> None:
        self.size, self.extra = size, extra


class Whole(Configured):
    def __init__(self, part: object, scale: float = 1.0) -> None:
        self.part = init_instance_by_config(part, accept_types=Part)
        self.scale = scale


class Plain:
    def __init__(self, part: object = None, factor: int = 2) -> None:
        self.part, self.factor = part, factor


class Raises:
    def __init__(self, value: int = 0) -> None:
        raise TypeError("from inside")


def make(**kwargs: object) -> dict[str, object]:
    return kwargs


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": f"{HERE}.Part", "size": 3},
        {"class": f"{HERE}.Part", "kwargs": {"size": 3}},
        {"class": "Part", "module_path": HERE, "kwargs": {"size": 3}},
        {"class": Part, "kwargs": {"size": 3}},
        OmegaConf.create(
            {"_target_": f"{HERE}.Part", "size": "${other}", "extra": None, "other": 3}
        ),
    ],
)
def test_every_form_of_configuration_builds_the_object(config):
    if OmegaConf.is_config(config):
        config = OmegaConf.masked_copy(config, ["_target_", "size", "other"])
        container = inst.resolve_config(config)
        container.pop("other")
        config = container
    part = init_instance_by_config(config)
    assert isinstance(part, Part)
    assert part.size == 3


def test_names_are_resolved_with_a_default_module():
    assert isinstance(init_instance_by_config(f"{HERE}.Part"), Part)
    assert isinstance(init_instance_by_config("Part", default_module=HERE), Part)
    assert isinstance(init_instance_by_config({"class": "Part"}, HERE), Part)
    assert init_instance_by_config({"func": f"{HERE}.make", "kwargs": {"a": 1}}) == {"a": 1}


def test_instance_of_accept_types_is_returned_unchanged():
    part = Part()
    assert init_instance_by_config(part, accept_types=Part) is part
    with pytest.raises(ConfigError, match="cannot build an object from a Part"):
        init_instance_by_config(part)


def test_pickle_is_loaded_from_uri_or_path(tmp_path, monkeypatch):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(a=torch.ones(2))))
    monkeypatch.chdir(tmp_path)
    for config in (f"file://{path}", "file://x.pkl", path):
        with pytest.raises(TrustError, match="trusted_pickle"):
            init_instance_by_config(config)
        with session_context(trusted_pickle=True):
            assert init_instance_by_config(config)["a"].tolist() == [1, 1]
    with pytest.raises(ConfigError, match=r"'missing.pkl': no such file"):
        init_instance_by_config("file://missing.pkl")


def test_module_path_can_be_a_python_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    def __init__(self, a=1):\n        self.a = a\n")
    config = {"class": "Mine", "module_path": str(file), "kwargs": {"a": 5}}
    assert init_instance_by_config(config).a == 5
    assert type(init_instance_by_config(config)) is type(init_instance_by_config(config))
    with pytest.raises(TrustError, match="which is code"):
        init_instance_by_config(as_stored_text(config))


def test_configured_class_builds_its_own_parts_and_others_get_built_parts():
    config = {"_target_": f"{HERE}.Whole", "part": {"_target_": f"{HERE}.Part", "size": 7}}
    whole = init_instance_by_config(config)
    assert whole.part.size == 7
    assert whole.to_config() == config  # the nested configuration is stored unchanged
    plain = init_instance_by_config({**config, "_target_": f"{HERE}.Plain"})
    assert isinstance(plain.part, Part)
    raw = init_instance_by_config({**config, "_target_": f"{HERE}.Plain", "_recursive_": False})
    assert raw.part == config["part"]


def test_partial_returns_a_factory():
    factory = init_instance_by_config({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5})
    assert isinstance(factory, functools.partial)
    optimizer = factory([torch.nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_live_objects_are_passed_without_copying():
    live = object()
    assert init_instance_by_config({"_target_": f"{HERE}.Plain", "part": live}).part is live
    assert init_instance_by_config({"class": f"{HERE}.Plain"}, part=live).part is live


def test_try_kwargs_are_filtered_by_the_signature():
    assert init_instance_by_config({"class": Part}, try_kwargs={"size": 4, "unknown": 1}).size == 4
    config = {"class": Part, "kwargs": {"size": 2}}
    assert init_instance_by_config(config, try_kwargs={"size": 4}).size == 2


def test_type_error_inside_a_constructor_is_not_swallowed():
    with pytest.raises(TypeError, match="from inside"):
        init_instance_by_config({"class": Raises}, try_kwargs={"value": 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": f"{HERE}.Prat"}, "Did you mean 'Part'"),
        ({"_target_": f"{HERE}.Part", "siez": 1}, "Did you mean 'size'"),
        ({"_target_": f"{HERE}.Plain", "facto": 1}, "Did you mean 'factor'"),
        ({"_target_": "torch.optim.Adam", "_partial_": True, "lrr": 1}, "Did you mean 'lr'"),
        ({"_target_": "nowhere.Thing"}, "no module named 'nowhere'"),
        ({"class": "Part"}, "does not name a module"),
        ({"kwargs": {}}, "neither '_target_' nor 'class'"),
        ({"class": f"{HERE}.Part", "size": 3}, "move them into 'kwargs'"),
        ({"_target_": f"{HERE}.HERE"}, "not a class or function"),
        (3, "cannot build an object from a int"),
    ],
)
def test_error_message_names_the_mistake(config, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        init_instance_by_config(config)


def test_error_in_a_nested_part_is_raised_unchanged():
    config = {"_target_": f"{HERE}.Plain", "part": {"_target_": f"{HERE}.Part", "siez": 1}}
    with pytest.raises(ArgumentError, match="Did you mean 'size'"):
        init_instance_by_config(config)


def test_flatten_dict_joins_keys_with_dots():
    config = {"a": 1, "c": {"a": 2, "b": {"x": 5}}, "d": [1, 2], "e": {}}
    assert inst.flatten_dict(config) == {"a": 1, "c.a": 2, "c.b.x": 5, "d": [1, 2], "e": {}}


def test_fill_placeholder_replaces_in_a_copy():
    model = object()
    config = {"model": "<MODEL>", "list": ["<MODEL>", 1], "day": "<a.b.0>", "a": {"b": ["2020"]}}
    result = inst.fill_placeholder(config, {"<MODEL>": model})
    assert result["model"] is model
    assert result["list"][0] is model
    assert result["day"] == "2020"
    assert config["model"] == "<MODEL>"


def test_auto_filter_kwargs_ignores_unknown_arguments_with_a_warning(caplog):
    def f(a, b=0):
        return a + b

    assert inst.auto_filter_kwargs(f)(1, b=2, c=3) == 3
    assert "'c'" in caplog.text


@pytest.mark.parametrize(
    "dataset",
    [
        {"_target_": "d.D", "segments": {"train": ["2020-01-01", "2020-06-30"]}},
        {"class": "d.D", "kwargs": {"segments": {"train": ["2020-01-01", "2020-06-30"]}}},
    ],
)
def test_a_placeholder_is_a_path_in_either_form(dataset):
    task = {"model": {"end": "<dataset.kwargs.segments.train.1>"}, "dataset": dataset}
    assert inst.fill_placeholder(task, {})["model"] == {"end": "2020-06-30"}
