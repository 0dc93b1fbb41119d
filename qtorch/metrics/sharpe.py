"""How sure a Sharpe ratio is, and how much of it is luck of having tried many strategies.

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
    """`probability` that the true Sharpe ratio is above `expected_best`, what luck gives.

    `sharpe` and `expected_best` are per period, over `count` of them; `variance` is that of the
    Sharpe ratios of the `tries`. One try has an `expected_best` of 0: the probabilistic Sharpe
    ratio.
    """

    sharpe: float
    expected_best: float
    probability: float
    tries: int
    variance: float
    count: int


def probabilistic_sharpe(
    sharpe: float, count: int, skew: float = 0.0, kurtosis: float = 3.0, above: float = 0.0
) -> float:
    """The probability that the true Sharpe ratio is over `above`, given `count` returns.

    `skew` and `kurtosis` (3 for a normal distribution) are those of the returns. NaN for fewer
    than two returns.
    """
    spread = 1 - skew * sharpe + (kurtosis - 1) / 4 * sharpe**2
    if count < 2 or not spread > 0 or math.isnan(sharpe):
        return math.nan
    return _NORMAL.cdf((sharpe - above) * math.sqrt(count - 1) / math.sqrt(spread))


def expected_best_sharpe(tries: int, variance: float) -> float:
    """The Sharpe ratio to expect of the best of `tries` independent ones without any skill.

    `variance` is that of the tries' Sharpe ratios.
    """
    if tries < 1:
        raise ArgumentError(f"tries={tries}: expected a whole number from 1.")
    if tries == 1:
        return 0.0
    first = _NORMAL.inv_cdf(1 - 1 / tries)
    second = _NORMAL.inv_cdf(1 - 1 / (tries * math.e))
    return math.sqrt(variance) * ((1 - _EULER) * first + _EULER * second)


def deflated_sharpe(
    returns: pd.Series, tries: int = 1, others: Sequence[float] = ()
) -> DeflatedSharpe:
    """The Sharpe ratio of `returns`, judged as the best of `tries`.

    `others` are the Sharpe ratios of the tries that are known, this one among them; their variance
    is the tries'. With fewer than two it is 1 / (count - 1), that of the estimate for normal
    returns without skill. NaN returns are left out.
    """
    values = returns.dropna().to_numpy(dtype=np.float64)
    count, sharpe = len(values), mean_over_std(pd.Series(values))
    known = [s for s in others if not math.isnan(s)]
    variance = float(np.var(known, ddof=1)) if len(known) > 1 else 1 / max(count - 1, 1)
    best = expected_best_sharpe(tries, variance)
    moments = _moments(values) if count > 1 else (0.0, 3.0)
    probability = probabilistic_sharpe(sharpe, count, *moments, above=best)
    return DeflatedSharpe(sharpe, best, probability, tries, variance, count)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Skew and kurtosis, of the sample as it is; those of a normal one where it is constant."""
    centred = values - values.mean()
    square = float(np.mean(centred**2))
    if not square > 0:
        return 0.0, 3.0
    return float(np.mean(centred**3)) / square**1.5, float(np.mean(centred**4)) / square**2
