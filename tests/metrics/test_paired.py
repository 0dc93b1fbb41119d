"""Paired tests of daily series: against scipy without lags, by hand with lags."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import holm, paired_test

DAYS = pd.bdate_range("2020-01-01", periods=400)


def test_without_lags_equals_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = (pd.Series(rng.normal(m, 1, 400), DAYS) for m in (0.2, 0.0))
    result = paired_test(a, b.iloc[50:], lags=0)
    expected = stats.ttest_rel(a.iloc[50:], b.iloc[50:])
    assert result.statistic == pytest.approx(expected.statistic)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(expected.statistic)))
    assert result.p_value == pytest.approx(expected.pvalue, rel=0.1)
    assert (result.count, result.lags) == (350, 0)
    assert paired_test(b, a).mean == -paired_test(a, b).mean


def test_newey_west_by_hand():
    difference = pd.Series([1.0, 2.0, 4.0, 1.0], DAYS[:4])  # mean 2: -1, 0, 2, -1
    result = paired_test(difference, difference * 0, lags=1)
    # Sum of squares 6; products of neighbours 0 + 0 - 2 = -2, with weight 1/2, counted twice.
    assert result.std_error == pytest.approx(math.sqrt((6 - 2) / 3 / 4))
    assert result.statistic == pytest.approx(2 / math.sqrt(4 / 12))


def test_lags_keep_the_false_positive_rate_low_under_autocorrelation():
    """With a true difference of zero, lags keep the rejection rate at 5% near its nominal level.

    Without lags more than a quarter of the autocorrelated series are rejected.
    """
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(300, 1000))
    smooth = np.stack([np.convolve(row, np.ones(5), "valid") for row in noise])
    days = pd.RangeIndex(smooth.shape[1])
    zero = pd.Series(0.0, days)
    p_values = [paired_test(pd.Series(row, days), zero, lags=12).p_value for row in smooth]
    p_values_without_lags = [
        paired_test(pd.Series(row, days), zero, lags=0).p_value for row in smooth
    ]
    assert np.mean(np.array(p_values) < 0.05) < 0.12
    assert np.mean(np.array(p_values_without_lags) < 0.05) > 0.25


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.1, 0.1]])
def test_too_few_or_constant_values_have_nan_p_value(values):
    series = pd.Series(values, DAYS[: len(values)], dtype=float)
    assert math.isnan(paired_test(series, series * 0).p_value)


def test_default_number_of_lags():
    series = pd.Series(np.random.default_rng(2).normal(size=400), DAYS)
    assert paired_test(series, series * 0).lags == math.floor(4 * 4 ** (2 / 9)) == 5
    with pytest.raises(ArgumentError, match="lags=-1"):
        paired_test(series, series * 0, lags=-1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03])[3] == pytest.approx(0.06)
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
