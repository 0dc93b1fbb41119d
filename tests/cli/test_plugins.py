"""Tests that the launchers and sweepers are registered as the files in conf/ name them."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins

from qtorch.cli.compose import config_path
from qtorch.cli.launchers.kinds import is_basic_launcher, launcher_class
from qtorch.cli.launchers.plugins import PACKAGE, register_plugins

FILES = [
    path
    for group in ("launcher", "sweeper")
    for path in sorted((config_path() / "hydra" / group).glob("*.yaml"))
    if PACKAGE in path.read_text()
]
# Hydra's submitit launchers accept any argument.
TYPED_FILES = [path for path in FILES if "Submitit" not in path.read_text()]


def test_every_plugin_has_a_config_file():
    register_plugins()
    register_plugins()
    registry = Plugins.instance().class_name_to_class
    plugins = {name for name in registry if name.startswith(f"{PACKAGE}.")}
    assert plugins == {yaml.safe_load(path.read_text())["_target_"] for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_plugin_can_be_pickled(path: Path):
    register_plugins()
    target = yaml.safe_load(path.read_text())["_target_"]
    plugin = Plugins.instance().class_name_to_class[target]
    assert pickle.loads(pickle.dumps(plugin)) is plugin


@pytest.mark.parametrize("path", TYPED_FILES, ids=lambda p: p.stem)
def test_config_file_has_exactly_the_plugins_arguments(path: Path):
    register_plugins()
    settings = yaml.safe_load(path.read_text())
    plugin = Plugins.instance().class_name_to_class[settings.pop("_target_")]
    assert settings.pop("_recursive_") is False  # the plugin builds nested objects itself
    assert list(settings) == list(inspect.signature(plugin).parameters)
    assert plugin(**settings) is not None


def test_basic_launcher_is_recognized():
    """Only for this launcher the sweep's command starts the fork server before the first job."""
    register_plugins()
    assert is_basic_launcher(
        launcher_class("hydra._internal.core_plugins.basic_launcher.BasicLauncher")
    )
    assert not is_basic_launcher(launcher_class(f"{PACKAGE}.RayLauncher"))
