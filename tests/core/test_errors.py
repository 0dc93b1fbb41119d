"""Parts of messages: suggested names, counts with a noun, hints for missing packages."""

import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from qtorch.core import errors
from qtorch.core.errors import format_count, nearest_name, unknown_name_message

PROJECT = tomllib.loads(Path(__file__).resolve().parents[2].joinpath("pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_error_messages_suggest_the_nearest_name():
    assert nearest_name("LSMT", ["LSTM", "GRU"]) == "LSTM"
    assert nearest_name("lstm", ["LSTM", "GRU"]) == "LSTM"
    assert nearest_name("zebra", ["LSTM"]) is None
    assert "Valid names: none" in unknown_name_message("field", "x", [])
    assert "(20 in all)" in unknown_name_message("field", "x", [f"f{k}" for k in range(20)])


def test_noun_agrees_with_the_number():
    assert format_count(1, "task") == "1 task"
    assert format_count(0, "task") == "0 tasks"
    assert format_count(1200, "entry", "entries") == "1,200 entries"
    assert format_count(1, "task is removed", "tasks are removed") == "1 task is removed"


def test_the_name_of_another_project_is_not_the_distributions():
    assert PROJECT["project"]["name"] == errors.DISTRIBUTION != "qtorch"


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"dev"}))
def test_command_names_the_packages_of_the_extra(extra):
    packages = EXTRAS[extra]
    assert requires(errors.DISTRIBUTION)
    assert sorted(errors.install_command(extra).split()[2:]) == sorted(f"'{p}'" for p in packages)


def test_command_of_a_checkout_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(errors, "DISTRIBUTION", "no-such-distribution")
    assert errors.install_command("ray").startswith("pip install -e '.[ray]'")
