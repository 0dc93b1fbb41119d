"""Significance of a Sharpe ratio, with a correction for the number of strategies tried.

All ratios are per period, not annualised. Bailey and Lopez de Prado, "The Sharpe Ratio Efficient
Frontier", 2012 (probabilistic), and "The Deflated Sharpe Ratio: Correcting for Selection Bias,
Backtest Overfitting and Non-Normality", 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.metrics.signal import mean_over_std

_EULER = 0.5772156649015329
_NORMAL = NormalDist()


@dataclass(frozen=True)
class DeflatedSharpe:
    """The `probability` that the true Sharpe ratio exceeds `expected_best`.

    `expected_best` is the ratio that the best of `tries` strategies without skill would reach by
    luck. `sharpe` and `expected_best` are per period, over `count` periods; `variance` is the
    variance of the tries' Sharpe ratios. With one try `expected_best` is 0, and `probability` is
    the probabilistic Sharpe ratio.
    """

    sharpe: float
    expected_best: float
    probability: float
    tries: int
    variance: float
    count: int


def probabilistic_sharpe(
    sharpe: float, count: int, skew: float = 0.0, kurtosis: float = 3.0, threshold: float = 0.0
) -> float:
    """The probability that the true Sharpe ratio exceeds `threshold`, estimated on `count` returns.

    `skew` and `kurtosis` (3 for a normal distribution) are those of the returns. NaN for fewer
    than two returns.
    """
    variance = 1 - skew * sharpe + (kurtosis - 1) / 4 * sharpe**2
    if count < 2 or not variance > 0 or math.isnan(sharpe):
        return math.nan
    return _NORMAL.cdf((sharpe - threshold) * math.sqrt(count - 1) / math.sqrt(variance))


def expected_best_sharpe(tries: int, variance: float) -> float:
    """The expected best Sharpe ratio of `tries` independent strategies without skill.

    `variance` is the variance of the tries' Sharpe ratios.
    """
    if tries < 1:
        raise ArgumentError(f"tries={tries}: expected a whole number of at least 1.")
    if tries == 1:
        return 0.0
    first = _NORMAL.inv_cdf(1 - 1 / tries)
    second = _NORMAL.inv_cdf(1 - 1 / (tries * math.e))
    return math.sqrt(variance) * ((1 - _EULER) * first + _EULER * second)


def deflated_sharpe(
    returns: pd.Series, tries: int = 1, sharpes: Sequence[float] = ()
) -> DeflatedSharpe:
    """Test the Sharpe ratio of `returns` as the best of `tries` strategies.

    `sharpes` are the known Sharpe ratios of the tries, including this one; they determine the
    variance. With fewer than two the variance is 1 / (count - 1), that of the estimated ratio for
    normal returns without skill. NaN returns are left out.
    """
    values = returns.dropna().to_numpy(dtype=np.float64)
    count, sharpe = len(values), mean_over_std(pd.Series(values))
    known_sharpes = [s for s in sharpes if not math.isnan(s)]
    variance = (
        float(np.var(known_sharpes, ddof=1)) if len(known_sharpes) > 1 else 1 / max(count - 1, 1)
    )
    best = expected_best_sharpe(tries, variance)
    moments = _moments(values) if count > 1 else (0.0, 3.0)
    probability = probabilistic_sharpe(sharpe, count, *moments, threshold=best)
    return DeflatedSharpe(sharpe, best, probability, tries, variance, count)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Sample skew and kurtosis without bias correction; 0 and 3 for constant values."""
    deviations = values - values.mean()
    square = float(np.mean(deviations**2))
    if not square > 0:
        return 0.0, 3.0
    return float(np.mean(deviations**3)) / square**1.5, float(np.mean(deviations**4)) / square**2
