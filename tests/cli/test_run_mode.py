"""Hydra's mode is found without composing the configuration, unless something could set it."""

from __future__ import annotations

import shutil

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from qtorch.cli.compose import config_path
from qtorch.cli.launchers import run_mode
from qtorch.cli.launchers.run_mode import find_mode, replace_mode_search


@pytest.fixture(autouse=True)
def _clear_hydra():
    """Leave no Hydra behind, beside which later tests in this process could not start one."""
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def compositions(monkeypatch):
    """Return the list of the configurations that are compositions to find the mode."""
    names = []

    def compose(hydra, config_name, overrides):
        names.append(config_name)
        return

    monkeypatch.setattr(run_mode, "_compose_mode", compose)
    return names


def make_hydra(*folders) -> Hydra:
    """Return a Hydra whose search path has these folders."""
    path = create_config_search_path(str(folders[0]))
    for folder in folders[1:]:
        path.append("command-line", f"file://{folder}")
    hydra = Hydra.__new__(Hydra)
    hydra.config_loader = ConfigLoaderImpl(path)
    return hydra


def test_hydra_uses_this_function():
    replace_mode_search()
    assert Hydra.get_mode is find_mode


def test_shipped_configurations_set_no_mode(compositions):
    words = ["model=lstm", "data.signal=0", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert find_mode(make_hydra(config_path()), "train", words) is None
    assert compositions == []


@pytest.mark.parametrize(
    "word",
    ["hydra.mode=MULTIRUN", "+hydra.mode=RUN", "hydra={mode: RUN}", "hydra.searchpath=[file://x]"],
)
def test_words_that_may_set_the_mode(compositions, word):
    find_mode(make_hydra(config_path()), "train", ["seed=1", word])
    assert compositions == ["train"]


def test_folder_of_the_user_may_set_the_mode(compositions, tmp_path):
    find_mode(make_hydra(config_path(), tmp_path), "train", [])
    assert compositions == ["train"]


def test_another_root_configuration_may_set_the_mode(compositions):
    find_mode(make_hydra(config_path()), "run", [])
    assert compositions == ["run"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("experiment/seeds.yaml", "# @package _global_\nhydra: {mode: MULTIRUN}\n", ["train"]),
        ("hydra/launcher/mine.yaml", "# @package hydra\nmode: MULTIRUN\n", ["train"]),
        ("experiment/more.yaml", "hydra:\n  searchpath: [file:///tmp]\n", ["train"]),
        ("handler/mine.yaml", "mode: soft\n", []),
        ("experiment/wide.yaml", "hydra: {launcher: {mmap_mode: r}}\n", []),
    ],
)
def test_a_file_of_the_main_folder_may_set_the_mode(compositions, tmp_path, name, text, expected):
    folder = tmp_path / "conf"
    shutil.copytree(config_path(), folder)
    (folder / name).write_text(text)
    find_mode(make_hydra(folder), "train", ["seed=1"])
    assert compositions == expected


def test_mode_in_a_file_of_the_main_folder_is_found(tmp_path):
    folder = tmp_path / "conf"
    shutil.copytree(config_path(), folder)
    (folder / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    )
    hydra = Hydra.create_main_hydra2("train", create_config_search_path(str(folder)))
    assert find_mode(hydra, "train", ["experiment=seeds"]) == RunMode.MULTIRUN
