"""Reports of coarser periods than the bars that were traded."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, unknown_name

_UNITS = {"min": "min", "day": "D", "week": "W", "month": "M"}
_ALIASES = {"minute": "min", "d": "day", "w": "week", "m": "month", "mon": "month"}


def period_name(freq: str) -> str:
    """A frequency as artifacts and metrics carry it: "1day", "5min", "2week"."""
    match = re.fullmatch(r"(\d*)\s*([A-Za-z]+)", str(freq).strip())
    unit = match[2].lower() if match else str(freq)
    unit = _ALIASES.get(unit, unit)
    if match is None or unit not in _UNITS:
        raise ConfigError(unknown_name("frequency", str(freq), _UNITS))
    return f"{int(match[1] or 1)}{unit}"


def resampled_report(report: pd.DataFrame, freq: str) -> pd.DataFrame:
    """A report by longer periods, as trading once a period would have written it.

    Money is that of the period's last bar; returns, costs and turnover are fractions of the
    account before the period's first bar, the benchmark's return is compounded. Rows carry the
    first bar of their period.
    """
    first, last = _edges(report.index, freq)
    rows = report.iloc[last].set_index(report.index[first])
    opening = report["account"].iloc[0] / (1 + report["return"].iloc[0] - report["cost"].iloc[0])
    before = np.r_[opening, rows["account"].to_numpy()[:-1]]
    for name in ("cost", "turnover"):
        spent = np.diff(rows[f"total_{name}"].to_numpy(), prepend=0.0)
        rows[name] = spent / before
    rows["return"] = rows["account"].to_numpy() / before - 1 + rows["cost"].to_numpy()
    grown = (1 + report["bench"]).groupby(_number(first, len(report))).prod(min_count=1)
    rows["bench"] = grown.to_numpy() - 1
    return rows


def resampled_indicators(indicators: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Trade indicators by longer periods: sums of amounts, values and counts, and means of the
    rest weighted by the number of orders."""
    first, _ = _edges(indicators.index, freq)
    number = _number(first, len(indicators))
    sums = indicators[["deal_amount", "value", "count"]].groupby(number).sum()
    means = indicators[["ffr", "pa", "pos"]].mul(indicators["count"], axis=0)
    means = means.groupby(number).sum().div(sums["count"].where(sums["count"] > 0), axis=0)
    return pd.concat([means, sums], axis=1).set_axis(indicators.index[first])


def _edges(dates: pd.Index, freq: str) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last row of each period."""
    match = re.fullmatch(r"(\d+)(\w+)", period_name(freq))
    assert match is not None
    index = pd.DatetimeIndex(dates)
    number = np.asarray(index.to_period(_UNITS[match[2]]).astype("int64"))
    number = (number - number[0]) // int(match[1])
    change = np.flatnonzero(np.diff(number)) + 1
    return np.r_[0, change], np.r_[change - 1, len(index) - 1]


def _number(first: np.ndarray, count: int) -> np.ndarray:
    """The number of each row's period."""
    starts = np.zeros(count, dtype=np.int64)
    starts[first[1:]] = 1
    return np.cumsum(starts)
