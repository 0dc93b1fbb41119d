"""Tests of significance: of a paired difference, of many tests, of the best Sharpe ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.metrics.signal import mean_over_std

_NORMAL = NormalDist()


@dataclass(frozen=True)
class PairedTest:
    """Result of a paired test: mean difference, standard error, their ratio, two-sided p-value."""

    mean: float
    std_error: float
    statistic: float
    p_value: float
    count: int
    lags: int


def paired_test(first: pd.Series, second: pd.Series, lags: int | None = None) -> PairedTest:
    """Test mean(first - second) = 0 over the days that both series have.

    Daily differences are autocorrelated, so the standard error is that of Newey and West ("A
    Simple, Positive Semi-Definite, Heteroskedasticity and Autocorrelation Consistent Covariance
    Matrix", 1987) with Bartlett weights over `lags` days: by default floor(4 (n / 100)^(2/9)),
    their rule of 1994. The p-value assumes a normal distribution. It is NaN for fewer than two
    days or a constant difference.
    """
    pairs = pd.concat([first, second], axis=1, join="inner").dropna().sort_index()
    difference = (pairs.iloc[:, 0] - pairs.iloc[:, 1]).to_numpy(dtype=np.float64)
    count = len(difference)
    if lags is None:
        lags = math.floor(4 * (count / 100) ** (2 / 9))
    if lags < 0:
        raise ArgumentError(f"lags={lags}: expected 0 or more.")
    lags = max(min(lags, count - 1), 0)
    mean = float(difference.mean()) if count else math.nan
    if count < 2:
        return PairedTest(mean, math.nan, math.nan, math.nan, count, lags)
    deviations = difference - mean
    total = float(deviations @ deviations)
    for lag in range(1, lags + 1):
        total += 2 * (1 - lag / (lags + 1)) * float(deviations[lag:] @ deviations[:-lag])
    # Dividing by n - 1 makes the statistic without lags the paired t statistic.
    error = math.sqrt(max(total, 0.0) / (count - 1) / count)
    if error <= 1e-15 * abs(mean) or error == 0:
        return PairedTest(mean, error, math.nan, math.nan, count, lags)
    ratio = mean / error
    return PairedTest(mean, error, ratio, 2 * _NORMAL.cdf(-abs(ratio)), count, lags)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests; a NaN stays NaN and does not count as a test.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted((p, k) for k, p in enumerate(p_values) if not math.isnan(p))
    adjusted_p_values, floor = [math.nan] * len(p_values), 0.0
    for place, (p, k) in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - place) * p))
        adjusted_p_values[k] = floor
    return adjusted_p_values


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
    return math.sqrt(variance) * ((1 - np.euler_gamma) * first + np.euler_gamma * second)


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
    variance = 1 / max(count - 1, 1)
    if len(known_sharpes) > 1:
        variance = float(np.var(known_sharpes, ddof=1))
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
