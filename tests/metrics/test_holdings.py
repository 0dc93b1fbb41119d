"""Drawdown and concentration, checked against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError
from qtorch.metrics import concentration, cumulative_return, drawdown, risk_analysis

RETURNS = pd.Series([0.1, -0.2, 0.05, 0.3])


def test_cumulative_return_and_drawdown_by_hand():
    np.testing.assert_allclose(cumulative_return(RETURNS), [0.1, -0.1, -0.05, 0.25])
    np.testing.assert_allclose(drawdown(RETURNS), [0, -0.2, -0.15, 0], atol=1e-12)
    np.testing.assert_allclose(cumulative_return(RETURNS, "product")[:2], [0.1, -0.12])
    np.testing.assert_allclose(
        drawdown(RETURNS, "product"), [0, -0.2, 0.8 * 1.05 - 1, 0], atol=1e-12
    )


@pytest.mark.parametrize("mode", ["sum", "product"])
def test_maximum_drawdown_equals_risk_analysis(mode):
    max_drawdown = risk_analysis(RETURNS, mode=mode).loc["max_drawdown", "risk"]
    assert drawdown(RETURNS, mode).min() == max_drawdown


def test_unknown_mode_is_rejected():
    with pytest.raises(ConfigError, match="sum"):
        drawdown(RETURNS, "sums")


def test_concentration_by_hand():
    days = pd.bdate_range("2020-01-01", periods=3)
    index = pd.MultiIndex.from_product([days, ["A", "B", "C", "D"]])
    index = index.set_names(["datetime", "instrument"])
    weight = pd.Series([0.2, 0.2, 0.2, 0.2, 0.6, -0.2, 0, np.nan, 0, 0, 0, 0], index)
    table = concentration(weight)
    assert table["num_positions"].tolist() == [4, 2, 0]
    np.testing.assert_allclose(table["gross"], [0.8, 0.8, 0])
    np.testing.assert_allclose(table["net"], [0.8, 0.4, 0])
    np.testing.assert_allclose(table["largest_weight"], [0.2, 0.6, 0])
    np.testing.assert_allclose(table["herfindahl"], [0.25, 0.75**2 + 0.25**2, np.nan])
    np.testing.assert_allclose(table["effective_positions"], [4, 1 / 0.625, np.nan])
