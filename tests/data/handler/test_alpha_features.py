"""Alpha158, Alpha360 and every operator: names, expressions and values against real Qlib."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError
from qtorch.data.expression import evaluate, parse, reach
from qtorch.data.handler.alpha import (
    LABEL,
    SELECTED_20,
    VWAP_LABEL,
    alpha158,
    alpha158_from_config,
    alpha360,
)
from qtorch.data.panel.panel import Panel

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "features.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def bars(golden):
    return Panel(
        torch.from_numpy(golden["bars"]),
        pd.DatetimeIndex(golden["calendar"]),
        golden["instruments"].tolist(),
        golden["fields"].tolist(),
        spans=torch.from_numpy(golden["spans"]),
    )


@pytest.mark.parametrize(("name", "features"), [("alpha158", alpha158()), ("alpha360", alpha360())])
def test_names_and_expressions_equal_qlibs(golden, name, features):
    expressions, names = features
    assert names == golden[f"{name}_names"].tolist()
    qlib_expressions = golden[f"{name}_expressions"].tolist()
    assert [parse(e) for e in expressions] == [parse(e) for e in qlib_expressions]


@pytest.mark.parametrize("part", ["operators", "alpha158", "alpha360"])
def test_values_equal_qlibs(golden, bars, part):
    """Compare every stored cell: within 1e-4 of Qlib's or 1e-6 of the column's scale, NaN for NaN.

    The one declared difference: on windows without any movement, a standard deviation is 0 here
    and a rounding error in Qlib (2e-7, or over 1e5 after a division by 1e-12).
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    from parity.features import compare_column

    column_numbers = golden[f"{part}_kept"]
    expressions = golden[f"{part}_expressions"][column_numbers].tolist()
    computed_values = evaluate(
        dict(zip(map(str, column_numbers), expressions, strict=True)), bars
    ).values.numpy()
    rows, columns = golden[f"{part}_row"], golden[f"{part}_instrument"]
    offset = 0
    for k, (column, length) in enumerate(
        zip(column_numbers, golden[f"{part}_lengths"], strict=True)
    ):
        sampled_rows = slice(int(column) % 4, None, 4)
        qlib_values = golden[f"{part}_values"][offset : offset + length]
        offset += length
        our_values = computed_values[rows[sampled_rows], columns[sampled_rows], k]
        row = compare_column(expressions[k], our_values, qlib_values)
        assert row.agree == 1, row
    assert offset == len(golden[f"{part}_values"])


def test_alpha158_from_qlibs_config():
    full_config = {
        "kbar": {},
        "price": {"windows": [0], "feature": ["OPEN", "HIGH", "LOW", "VWAP"]},
        "rolling": {},
    }
    assert alpha158_from_config(full_config) == alpha158()
    prices = {"price": {}, "volume": {"windows": [0, 2]}}
    expressions, names = alpha158_from_config(prices)
    assert names[:6] == ["OPEN0", "OPEN1", "OPEN2", "OPEN3", "OPEN4", "HIGH0"]
    assert names[-2:] == ["VOLUME0", "VOLUME2"]
    assert expressions[-2:] == ["$volume/($volume+1e-12)", "Ref($volume, 2)/($volume+1e-12)"]
    rolling = {"rolling": {"windows": [3], "include": ["ROC", "LOW", "RANK"], "exclude": ["RANK"]}}
    assert alpha158_from_config(rolling) == (
        ["Ref($close, 3)/$close", "Min($low, 3)/$close"],
        ["ROC3", "MIN3"],
    )
    for config, message in (
        ({"kbars": {}}, "Did you mean 'kbar'"),
        ({"rolling": {"window": [5]}}, "Did you mean 'windows'"),
        ({"rolling": {"include": ["ROCK"]}}, "Did you mean 'ROC'"),
        ({"price": {"feature": "OPEN"}}, "expected a list of names"),
    ):
        with pytest.raises(ConfigError, match=message):
            alpha158_from_config(config)


def test_selected_columns_and_label_horizons():
    assert len(set(SELECTED_20)) == 20
    assert set(SELECTED_20) <= set(alpha158()[1])
    assert reach(LABEL) == reach(VWAP_LABEL) == (0, 2)
    assert max(reach(e)[0] for e in alpha158()[0]) == 60
    assert all(reach(e)[1] == 0 for e in [*alpha158()[0], *alpha360()[0]])


@pytest.mark.qlib
@pytest.mark.slow
def test_real_qlib_on_a_larger_stress_market(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    from parity.expressions import operator_expressions
    from parity.features import ask_qlib, compare
    from parity.stress import stress_market

    from qtorch.data.source.writer import write_qlib

    market = stress_market(24, 260, seed=11)
    folder = write_qlib(market, tmp_path / "market")
    python = os.environ["QTORCH_QLIB_PYTHON"]
    table = []
    for request in (operator_expressions(), "alpha158", "alpha360"):
        table += compare(market, ask_qlib(python, folder, request))
    cells = sum(row.cells for row in table)
    assert sum(row.cells * row.agree for row in table) >= 0.9999 * cells
    assert not [str(row) for row in table if row.agree < 0.999]
