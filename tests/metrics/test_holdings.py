"""Drawdown and concentration by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError
from qtorch.metrics import concentration, cumulative_return, drawdown, risk_analysis

RETURNS = pd.Series([0.1, -0.2, 0.05, 0.3])


def test_curves_by_hand():
    np.testing.assert_allclose(cumulative_return(RETURNS), [0.1, -0.1, -0.05, 0.25])
    np.testing.assert_allclose(drawdown(RETURNS), [0, -0.2, -0.15, 0], atol=1e-12)
    np.testing.assert_allclose(cumulative_return(RETURNS, "product")[:2], [0.1, -0.12])
    np.testing.assert_allclose(
        drawdown(RETURNS, "product"), [0, -0.2, 0.8 * 1.05 - 1, 0], atol=1e-12
    )


@pytest.mark.parametrize("mode", ["sum", "product"])
def test_the_deepest_point_is_that_of_the_risk_analysis(mode):
    deepest = risk_analysis(RETURNS, mode=mode).loc["max_drawdown", "risk"]
    assert drawdown(RETURNS, mode).min() == deepest


def test_an_unknown_mode_is_named():
    with pytest.raises(ConfigError, match="sum"):
        drawdown(RETURNS, "sums")


def test_concentration_by_hand():
    days = pd.bdate_range("2020-01-01", periods=3)
    index = pd.MultiIndex.from_product([days, ["A", "B", "C", "D"]])
    index = index.set_names(["datetime", "instrument"])
    weight = pd.Series([0.2, 0.2, 0.2, 0.2, 0.6, -0.2, 0, np.nan, 0, 0, 0, 0], index)
    found = concentration(weight)
    assert found["num_positions"].tolist() == [4, 2, 0]
    np.testing.assert_allclose(found["gross"], [0.8, 0.8, 0])
    np.testing.assert_allclose(found["net"], [0.8, 0.4, 0])
    np.testing.assert_allclose(found["largest_weight"], [0.2, 0.6, 0])
    np.testing.assert_allclose(found["herfindahl"], [0.25, 0.75**2 + 0.25**2, np.nan])
    np.testing.assert_allclose(found["effective_positions"], [4, 1 / 0.625, np.nan])
