"""Overfitting and the tests of the best of many strategies: hand-worked, closed forms, noise."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from qtorch.core.errors import ArgumentError
from qtorch.metrics import (
    assess_selection,
    overfitting_probability,
    superiority_test,
)
from qtorch.metrics.selection import _normal_quantile, stationary_blocks


def noise(seed: int, days: int = 500, strategies: int = 20) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(seed).normal(0, 0.01, (days, strategies)))


def test_overfitting_beside_plain_loops() -> None:
    returns = noise(0, 60, 5)
    blocks = np.array_split(np.arange(60), 6)
    failures, losses, ranks = [], [], []
    for half in combinations(range(6), 3):
        inside = returns.iloc[np.concatenate([blocks[k] for k in half])]
        outside = returns.drop(inside.index)
        best = (inside.mean() / inside.std()).idxmax()
        rank = (outside.mean() / outside.std()).rank()[best] / 6
        failures.append(math.log(rank / (1 - rank)) <= 0)
        losses.append(outside[best].mean() < 0)
        ranks.append(rank * 6 / 5)
    result = overfitting_probability(returns, num_blocks=6)
    assert result.num_splits == 20
    assert result.probability == pytest.approx(np.mean(failures))
    assert result.loss_probability == pytest.approx(np.mean(losses))
    assert result.mean_rank == pytest.approx(np.mean(ranks))


def test_extremes_of_overfitting() -> None:
    days = np.arange(160)
    steady = noise(1, 160, 4)
    steady[2] += 0.05
    assert overfitting_probability(steady).probability == 0
    # Each strategy earns in one half of the blocks only: what was best there is worst elsewhere.
    reverse = pd.DataFrame({"a": np.where(days < 80, 0.01, -0.01), "b": np.where(days < 80, -1, 1)})
    reverse += np.random.default_rng(0).normal(0, 1e-3, reverse.shape)
    assert overfitting_probability(reverse, num_blocks=2).probability == 1
    flat = pd.DataFrame({"cash": np.full(160, 1e-4), "x": steady[0], "y": steady[1]})
    assert 0 < overfitting_probability(flat).mean_rank <= 1
    short_result = overfitting_probability(steady.head(10))
    assert math.isnan(short_result.probability)
    with pytest.raises(ArgumentError, match="even number"):
        overfitting_probability(steady, num_blocks=5)
    with pytest.raises(ArgumentError, match="frame"):
        overfitting_probability(steady[0])


def test_a_single_strategy_is_a_t_test() -> None:
    returns = noise(2, 800, 1) + 0.0006
    ratio = float(returns[0].mean() / returns[0].std(ddof=0) * math.sqrt(800))
    result = superiority_test(returns, block_length=1, num_samples=4000)
    expected = NormalDist().cdf(-ratio)
    assert result.statistic == pytest.approx(ratio)
    for p_value in (result.p_value, result.upper, result.reality_check):
        assert p_value == pytest.approx(expected, abs=0.012)


def test_many_strategies_need_a_larger_ratio() -> None:
    """The upper p-value of N independent strategies is 1 - Phi(statistic) ** N."""
    returns = noise(3, 600, 50)
    result = superiority_test(returns, block_length=1, num_samples=3000)
    assert result.upper == pytest.approx(1 - NormalDist().cdf(result.statistic) ** 50, abs=0.04)
    assert result.lower <= result.p_value <= result.upper
    assert result.num_strategies == 50
    poor = pd.concat([returns, pd.DataFrame(noise(4, 600, 50).to_numpy() - 0.01)], axis=1)
    poor.columns = range(100)
    # Strategies that are clearly worse make the other bounds conservative, not Hansen's.
    result_with_poor = superiority_test(poor, block_length=1, num_samples=3000)
    assert result_with_poor.p_value == pytest.approx(result.p_value, abs=0.03)
    assert result_with_poor.upper > result_with_poor.p_value + 0.02


def test_blocks_keep_the_autocorrelation() -> None:
    shocks = np.random.default_rng(5).normal(0, 1, (2000, 3))
    values = shocks.copy()
    for day in range(1, 2000):
        values[day, 0] += 0.6 * values[day - 1, 0]
    lengths, variances = stationary_blocks(values)
    assert lengths[0] > 10 > 4 > lengths[1:].max()
    assert variances == pytest.approx([6.25, 1, 1], rel=0.3)  # 1 / (1 - 0.6) ** 2
    series = pd.DataFrame(values[:, :1] * 0.01)
    independent = superiority_test(series, block_length=1)
    dependent = superiority_test(series, block_length=float(lengths[0]))
    # The long-run standard deviation of an AR(1) with 0.6 is twice that of its values.
    assert independent.statistic / dependent.statistic == pytest.approx(2, rel=0.15)
    # Blocks of the default length lose a part of the dependence, which is added again.
    default = superiority_test(series)
    assert default.statistic < dependent.statistic * 0.99
    assert independent.statistic / default.statistic == pytest.approx(2, rel=0.15)
    other_series = pd.DataFrame(values[:, 1:])
    length = float(lengths[1:].mean())
    independent = superiority_test(other_series, block_length=length)
    assert superiority_test(other_series).statistic == pytest.approx(independent.statistic, rel=0.1)


@pytest.mark.parametrize(("ratio", "freedom"), [(0.5, 19), (2.0, 30), (3.7, 60), (4.0, 749)])
def test_ratios_have_the_tail_of_a_t_distribution(ratio, freedom):
    expected = stats.norm.isf(stats.t.sf(ratio, freedom))
    assert _normal_quantile(ratio, freedom) == pytest.approx(expected, abs=0.002)


def test_missing_days_and_constant_columns() -> None:
    returns = noise(6, 100, 3)
    returns.iloc[:10, 1] = np.nan
    assert superiority_test(returns).num_days == 90
    constant = superiority_test(pd.DataFrame(np.zeros((50, 2))))
    assert math.isnan(constant.p_value)
    assert math.isnan(superiority_test(returns.head(12)).p_value)
    with pytest.raises(ArgumentError, match="at least 1"):
        superiority_test(returns, block_length=0.5)
    with pytest.raises(ArgumentError, match="tries=2"):
        assess_selection(returns, tries=2)


def test_selection_of_a_planted_edge() -> None:
    returns = noise(7)
    assert not assess_selection(returns).is_beyond_luck
    returns[3] += 0.003
    selection = assess_selection(returns, tries=40)
    assert selection.best == "3" == selection.superiority.best
    assert selection.is_beyond_luck
    assert selection.sharpe.tries == 40


@pytest.mark.slow
def test_noise_is_no_find_and_a_planted_edge_is_found() -> None:
    """500 strategies of noise with heavy tails, 20 repeats; then the same with one edge.

    The seeds were used for nothing else; `scripts/selection_study.py` has more of them.
    """
    repeats = [
        pd.DataFrame(np.random.default_rng(seed).standard_t(5, (750, 500)) * 0.01)
        for seed in range(50_000, 50_020)
    ]
    finds = [r for r in repeats if superiority_test(r, num_samples=500).p_value < 0.05]
    # A test at 5% errs in more than three of 20 repeats with a probability of 1.6%.
    assert len(finds) <= 3
    assert not any(assess_selection(r, num_samples=500).is_beyond_luck for r in finds)
    probabilities = []
    for returns in repeats[:4]:
        probabilities.append(overfitting_probability(returns).probability)
        returns[123] += 0.0035
        edge_selection = assess_selection(returns, num_samples=500)
        assert edge_selection.is_beyond_luck
        assert edge_selection.best == "123"
    assert 0.2 < np.mean(probabilities) < 0.8
