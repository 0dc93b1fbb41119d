"""Probabilistic and deflated Sharpe ratios, against the paper's numbers and scipy's moments."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import deflated_sharpe, expected_best_sharpe, probabilistic_sharpe


@pytest.mark.parametrize(("tries", "expected"), [(100, 0.9004), (46, 0.9505)])
def test_probability_equals_the_example_of_the_paper(tries, expected):
    """Bailey and Lopez de Prado (2014).

    An annual ratio of 2.5 over five years of 250 days, skew -3, kurtosis 10; the variance of the
    tries' annual ratios is 1/2.
    """
    best = expected_best_sharpe(tries, variance=0.5 / 250)
    if tries == 100:
        assert best == pytest.approx(0.1132, abs=5e-5)
    probability = probabilistic_sharpe(
        2.5 / math.sqrt(250), 1250, skew=-3, kurtosis=10, threshold=best
    )
    assert probability == pytest.approx(expected, abs=1e-4)


def test_expected_best_sharpe_equals_a_simulation():
    draws = np.random.default_rng(0).normal(0, 0.3, (20_000, 50)).max(axis=1)
    assert expected_best_sharpe(50, 0.09) == pytest.approx(draws.mean(), rel=0.02)


def test_single_try_uses_the_sample_moments():
    values = np.random.default_rng(1).standard_t(5, 400) * 0.01 + 0.0007
    result = deflated_sharpe(pd.Series([np.nan, *values]))
    sharpe = values.mean() / values.std(ddof=1)
    variance = 1 - stats.skew(values) * sharpe
    variance += (stats.kurtosis(values, fisher=False) - 1) / 4 * sharpe**2
    assert result.probability == pytest.approx(
        stats.norm.cdf(sharpe * math.sqrt(399 / variance)), rel=1e-9
    )
    assert (result.expected_best, result.tries, result.count) == (0.0, 1, 400)
    assert result.sharpe == pytest.approx(sharpe)


def test_more_tries_lower_the_probability_and_known_sharpes_set_the_variance():
    returns = pd.Series(np.random.default_rng(2).normal(0.001, 0.01, 300))
    single, one_of_ten = (deflated_sharpe(returns, tries=n) for n in (1, 10))
    assert one_of_ten.probability < single.probability
    assert one_of_ten.variance == pytest.approx(1 / 299)
    with_known_sharpes = deflated_sharpe(returns, tries=10, sharpes=[0.1, 0.02, math.nan, -0.03])
    assert with_known_sharpes.variance == pytest.approx(np.var([0.1, 0.02, -0.03], ddof=1))


@pytest.mark.parametrize("values", [[], [0.01], [0.01, 0.01, 0.01]])
def test_undefined_sharpe_has_nan_probability(values):
    assert math.isnan(deflated_sharpe(pd.Series(values, dtype=float), tries=3).probability)


def test_zero_tries_are_rejected():
    with pytest.raises(ArgumentError, match="tries=0"):
        expected_best_sharpe(0, 1.0)
