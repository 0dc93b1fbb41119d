"""How sure a Sharpe ratio is: the numbers of the paper, and scipy's moments."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import deflated_sharpe, expected_best_sharpe, probabilistic_sharpe


@pytest.mark.parametrize(("tries", "expected"), [(100, 0.9004), (46, 0.9505)])
def test_the_example_of_the_paper(tries, expected):
    """Bailey and Lopez de Prado (2014): an annual ratio of 2.5 over five years of 250 days,
    skew -3, kurtosis 10, variance of the tries' annual ratios 1/2."""
    best = expected_best_sharpe(tries, variance=0.5 / 250)
    if tries == 100:
        assert best == pytest.approx(0.1132, abs=5e-5)
    found = probabilistic_sharpe(2.5 / math.sqrt(250), 1250, skew=-3, kurtosis=10, above=best)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_best_of_many_without_skill_is_what_a_simulation_finds():
    draws = np.random.default_rng(0).normal(0, 0.3, (20_000, 50)).max(axis=1)
    assert expected_best_sharpe(50, 0.09) == pytest.approx(draws.mean(), rel=0.02)


def test_a_single_try_is_the_probabilistic_ratio_with_the_moments_of_the_sample():
    values = np.random.default_rng(1).standard_t(5, 400) * 0.01 + 0.0007
    found = deflated_sharpe(pd.Series([np.nan, *values]))
    sharpe = values.mean() / values.std(ddof=1)
    spread = 1 - stats.skew(values) * sharpe
    spread += (stats.kurtosis(values, fisher=False) - 1) / 4 * sharpe**2
    assert found.probability == pytest.approx(
        stats.norm.cdf(sharpe * math.sqrt(399 / spread)), rel=1e-9
    )
    assert (found.expected_best, found.tries, found.count) == (0.0, 1, 400)
    assert found.sharpe == pytest.approx(sharpe)


def test_tries_make_it_less_sure_and_their_spread_is_taken_where_it_is_known():
    returns = pd.Series(np.random.default_rng(2).normal(0.001, 0.01, 300))
    alone, one_of_ten = (deflated_sharpe(returns, tries=n) for n in (1, 10))
    assert one_of_ten.probability < alone.probability
    assert one_of_ten.variance == pytest.approx(1 / 299)
    known = deflated_sharpe(returns, tries=10, others=[0.1, 0.02, math.nan, -0.03])
    assert known.variance == pytest.approx(np.var([0.1, 0.02, -0.03], ddof=1))


@pytest.mark.parametrize("values", [[], [0.01], [0.01, 0.01, 0.01]])
def test_what_has_no_ratio_has_no_probability(values):
    assert math.isnan(deflated_sharpe(pd.Series(values, dtype=float), tries=3).probability)


def test_no_try_is_refused():
    with pytest.raises(ArgumentError, match="tries=0"):
        expected_best_sharpe(0, 1.0)
