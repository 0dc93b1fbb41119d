"""Risk of returns per period: cumulative return, drawdown, annual figures."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd

from qtorch.core.dates import detect_frequency, is_intraday, parse_frequency
from qtorch.core.errors import ConfigError, check_name
from qtorch.core.session import get_region

Mode: TypeAlias = Literal["sum", "product"]
MODES = ("sum", "product")


def cumulative_return(r: pd.Series, mode: Mode = "sum") -> pd.Series:
    """Cumulative return of returns per period (fractions): summed, or compounded ("product")."""
    check_name("mode of returns", mode, MODES)
    return r.cumsum() if mode == "sum" else (1 + r).cumprod() - 1


def drawdown(r: pd.Series, mode: Mode = "sum", *, as_qlib: bool = False) -> pd.Series:
    """Drawdown of the cumulative return from its running maximum: zero or negative.

    A fraction of the initial capital ("sum") or of the running maximum ("product"). The curve
    starts at the initial capital, so a loss in the first period is a drawdown. With `as_qlib` it
    starts at the first return, as in Qlib's `risk_analysis`.
    """
    total = cumulative_return(r, mode)
    peak = total.cummax() if as_qlib else total.cummax().clip(lower=0.0)
    return total - peak if mode == "sum" else (1 + total) / (1 + peak) - 1


def periods_per_year(
    freq: str | None = None, *, region: str | None = None, dates: pd.Index | None = None
) -> float:
    """Return the number of bars per year of a frequency such as "day", "month", "5min" or "2week".

    `region` (default: the session's) sets the trading days per year, 252 for "us" and 238 for "cn"
    and "tw", and the minutes of its session. If `dates` are bars within a day, these are counted:
    a day has the median of their number over all days but the first and last. Without `freq` it
    is that of `dates`, or "day".
    """
    calendar = dates.unique().sort_values() if isinstance(dates, pd.DatetimeIndex) else None
    if freq is None:
        freq = "day" if calendar is None else detect_frequency(calendar)
    count, unit = parse_frequency(freq)
    rules = get_region(region)
    if unit != "min":
        years = {"day": rules.days_per_year, "week": rules.weeks_per_year, "month": 12}
        return years[unit] / count
    if calendar is None or not is_intraday(calendar):
        return rules.days_per_year * rules.minutes_per_day / count
    counts = np.unique(calendar.normalize(), return_counts=True)[1]
    whole_days = counts[1:-1] if len(counts) > 2 else counts.max()  # the edges may be cut
    return rules.days_per_year * float(np.median(whole_days))


def risk_analysis(
    r: pd.Series,
    N: float | None = None,
    freq: str | None = None,
    mode: Mode = "sum",
    *,
    as_qlib: bool = False,
) -> pd.DataFrame:
    """Compute mean, std, annualized_return, information_ratio and max_drawdown of returns.

    `r` are returns per period (fractions). `N` is the number of periods per year, by default that
    of `freq` in the session's region (`periods_per_year`). Mode "sum" adds returns: annual return
    mean x N, drawdown min(cumsum - cummax(cumsum)). Mode "product" compounds them: geometric mean,
    standard deviation of log returns, drawdown as a fraction of the peak. Standard deviations use
    ddof 1. Returns a frame with one column "risk". Corresponds to `risk_analysis` of
    qlib/contrib/evaluate.py. Differences: a loss in the first period counts as a drawdown (not
    with `as_qlib`); `freq` defaults to that of the index, else to "day"; passing both is an error;
    days per year are those of the region (Qlib: 238 everywhere).
    """
    if N is not None and freq is not None:
        raise ConfigError("risk_analysis takes N or freq, not both.")
    scale = float(N) if N is not None else periods_per_year(freq, dates=r.index)
    check_name("mode of returns", mode, MODES)
    if mode == "sum":
        mean, std = float(r.mean()), float(r.std(ddof=1))
        annual = mean * scale
    else:
        curve = (1 + r).cumprod()
        growth = float(curve.iloc[-1]) if len(curve) else math.nan
        mean = growth ** (1 / max(len(r), 1)) - 1
        std = float(np.log(1 + r).std(ddof=1))
        annual = growth ** (scale / max(len(r), 1)) - 1
    values = {
        "mean": mean,
        "std": std,
        "annualized_return": annual,
        "information_ratio": float(np.divide(mean, std) * math.sqrt(scale)),
        "max_drawdown": float(drawdown(r, mode, as_qlib=as_qlib).min()),
    }
    return pd.Series(values).to_frame("risk")
