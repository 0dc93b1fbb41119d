"""Paired significance tests of two daily series, and correction for multiple tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError


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
    if count < 2:
        mean = float(difference.mean()) if count else math.nan
        return PairedTest(mean, math.nan, math.nan, math.nan, count, lags)
    mean = float(difference.mean())
    deviations = difference - mean
    total = float(deviations @ deviations)
    for lag in range(1, lags + 1):
        total += 2 * (1 - lag / (lags + 1)) * float(deviations[lag:] @ deviations[:-lag])
    # Dividing by n - 1 makes the statistic without lags the paired t statistic.
    error = math.sqrt(max(total, 0.0) / (count - 1) / count)
    if error <= 1e-15 * abs(mean) or error == 0:
        return PairedTest(mean, error, math.nan, math.nan, count, lags)
    ratio = mean / error
    return PairedTest(mean, error, ratio, 2 * NormalDist().cdf(-abs(ratio)), count, lags)


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
