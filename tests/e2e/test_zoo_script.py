"""Tests of scripts/zoo.py: its rows, stored results, and repeated cells."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from qtorch.cli.compose import config_path

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmark"))
    import zoo

    yield zoo
    for name in ("zoo", "zoo_cells"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def provider(tmp_path_factory) -> Path:
    from qtorch.data import SyntheticSource
    from qtorch.data.source.writer import write_qlib

    folder = tmp_path_factory.mktemp("bars")
    source = SyntheticSource(20, "2018-07-01", "2020-06-30", signal=0.2)
    write_qlib(source, folder / "bars")
    return folder / "bars"


def arguments(provider: Path, **changes) -> argparse.Namespace:
    defaults = {
        "provider": str(provider), "qlib_python": None, "only": "linear,hist", "seeds": "0,1",
        "speed": False, "steps": 2, "threads": 1, "universe": "stocks", "instruments": 15,
        "train": "2019-08-01,2019-12-31", "valid": "2020-01-01,2020-03-31",
        "test": "2020-04-01,2020-06-30", "step_len": 5, "epochs": 1, "handler": "alpha158_20",
    }  # fmt: skip
    return argparse.Namespace(**{**defaults, **changes})


@pytest.mark.slow
def test_cells_are_stored_and_not_repeated(zoo, provider, tmp_path, capsys):
    args = arguments(provider)
    settings = zoo.Settings.from_arguments(args, tmp_path)
    zoo.zoo_cells.prepare_worker(settings)
    results = zoo.Results(tmp_path / "zoo.json", settings.numbers)
    key, cell = zoo.run_cell(("linear", 0, settings))
    assert key == "linear:0"
    assert -1 <= cell["Rank IC"] <= 1
    assert cell["train_rate"] > 0
    results.add(key, cell)
    key, cell = zoo.run_cell(("hist", zoo.SPEED, settings))
    assert cell["train_rate"] > 0, cell
    assert cell["predict_rate"] > 0
    assert cell["parameters"] > 1000
    results.add(key, cell)
    loaded_results = zoo.Results(tmp_path / "zoo.json", settings.numbers)
    assert loaded_results.cells.keys() == {"linear:0", "hist:speed"}
    missing_cells = {("hist", 0), ("hist", 1), ("linear", 1)}
    assert set(zoo.missing_cells(args, loaded_results)) == missing_cells
    zoo.print_table(loaded_results)
    rows = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in rows[2:]] == ["hist", "linear"]
    other_settings = zoo.Settings.from_arguments(arguments(provider, epochs=2), tmp_path)
    with pytest.raises(SystemExit, match="epochs=1"):
        zoo.Results(tmp_path / "zoo.json", other_settings.numbers)


def test_every_model_config_is_a_row(zoo):
    choices = {p.stem for p in config_path().joinpath("model").glob("*.yaml")} - {"lightning"}
    assert set(zoo.find_rows(qlib=False, only="")) == choices
    assert set(zoo.zoo_cells.VARIANTS) <= choices
    rows = zoo.find_rows(qlib=True, only="")
    assert {r for r in rows if r.startswith(zoo.QLIB)} == {
        "qlib/lstm", "qlib/gru", "qlib/alstm", "qlib/transformer",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="unknown: lstn"):
        zoo.find_rows(qlib=False, only="lstn")
