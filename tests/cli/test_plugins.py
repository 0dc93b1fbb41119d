"""Our launchers and sweepers are Hydra's plugins, as their files in conf/ name them."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins

from qtorch.cli.config_path import config_path
from qtorch.cli.plugins import PACKAGE, register_plugins

FILES = [
    path
    for group in ("launcher", "sweeper")
    for path in sorted((config_path() / "hydra" / group).glob("*.yaml"))
    if PACKAGE in path.read_text()
]
OWN = [path for path in FILES if "Submitit" not in path.read_text()]  # theirs takes anything


def test_there_is_a_file_for_each():
    register_plugins()
    register_plugins()
    known = Plugins.instance().class_name_to_class
    ours = {name for name in known if name.startswith(f"{PACKAGE}.")}
    assert ours == {yaml.safe_load(path.read_text())["_target_"] for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_worker_finds_it_by_its_own_module(path: Path):
    register_plugins()
    target = yaml.safe_load(path.read_text())["_target_"]
    plugin = Plugins.instance().class_name_to_class[target]
    assert pickle.loads(pickle.dumps(plugin)) is plugin


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_a_file_gives_every_argument_and_no_other(path: Path):
    register_plugins()
    settings = yaml.safe_load(path.read_text())
    plugin = Plugins.instance().class_name_to_class[settings.pop("_target_")]
    assert settings.pop("_recursive_") is False  # a mapping inside is ours to build
    assert list(settings) == list(inspect.signature(plugin).parameters)
    assert plugin(**settings) is not None
