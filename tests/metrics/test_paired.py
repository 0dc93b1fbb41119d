"""The paired test of daily series: scipy's where days are independent, by hand where not."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import holm, paired_test

DAYS = pd.bdate_range("2020-01-01", periods=400)


def test_without_lags_it_is_the_paired_t_statistic():
    rng = np.random.default_rng(0)
    a, b = (pd.Series(rng.normal(m, 1, 400), DAYS) for m in (0.2, 0.0))
    found = paired_test(a, b.iloc[50:], lags=0)
    expected = stats.ttest_rel(a.iloc[50:], b.iloc[50:])
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(expected.statistic)))
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.1)
    assert (found.count, found.lags) == (350, 0)
    assert paired_test(b, a).mean == -paired_test(a, b).mean


def test_newey_and_west_by_hand():
    gap = pd.Series([1.0, 2.0, 4.0, 1.0], DAYS[:4])  # mean 2: -1, 0, 2, -1
    found = paired_test(gap, gap * 0, lags=1)
    # sum of squares 6; products of neighbours 0 + 0 - 2 = -2, weight 1/2, twice
    assert found.std_error == pytest.approx(math.sqrt((6 - 2) / 3 / 4))
    assert found.statistic == pytest.approx(2 / math.sqrt(4 / 12))


def test_days_that_follow_each_other_are_not_taken_for_independent():
    """Of series without a difference 5 in 100 are called different, not a third of them."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(300, 1000))
    smooth = np.stack([np.convolve(row, np.ones(5), "valid") for row in noise])
    days = pd.RangeIndex(smooth.shape[1])
    zero = pd.Series(0.0, days)
    p = [paired_test(pd.Series(row, days), zero, lags=12).p_value for row in smooth]
    blind = [paired_test(pd.Series(row, days), zero, lags=0).p_value for row in smooth]
    assert np.mean(np.array(p) < 0.05) < 0.12
    assert np.mean(np.array(blind) < 0.05) > 0.25


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.1, 0.1]])
def test_nothing_to_judge_gives_no_p_value(values):
    series = pd.Series(values, DAYS[: len(values)], dtype=float)
    assert math.isnan(paired_test(series, series * 0).p_value)


def test_the_lags_by_default():
    series = pd.Series(np.random.default_rng(2).normal(size=400), DAYS)
    assert paired_test(series, series * 0).lags == math.floor(4 * 4 ** (2 / 9)) == 5
    with pytest.raises(ArgumentError, match="lags=-1"):
        paired_test(series, series * 0, lags=-1)


def test_several_tests_by_hand():
    assert holm([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03])[3] == pytest.approx(0.06)
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
