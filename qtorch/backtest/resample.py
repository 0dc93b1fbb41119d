"""Aggregate the reports of a backtest to longer periods than the traded bars."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, unknown_name

_UNITS = {"min": "min", "day": "D", "week": "W", "month": "M"}
_ALIASES = {"minute": "min", "d": "day", "w": "week", "m": "month", "mon": "month"}


def period_name(freq: str) -> str:
    """Normalise a frequency to the form used in artifact and metric names: "1day", "5min"."""
    match = re.fullmatch(r"(\d*)\s*([A-Za-z]+)", str(freq).strip())
    unit = match[2].lower() if match else str(freq)
    unit = _ALIASES.get(unit, unit)
    if match is None or unit not in _UNITS:
        raise ConfigError(unknown_name("frequency", str(freq), _UNITS))
    return f"{int(match[1] or 1)}{unit}"


def resample_report(report: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Aggregate a report to longer periods, as if each period were one bar.

    Money columns are those of the period's last bar; returns, costs and turnover are fractions of
    the account before the period's first bar; the benchmark's return is compounded. Each row is
    labelled with the first bar of its period.
    """
    first, last = _period_edges(report.index, freq)
    rows = report.iloc[last].set_index(report.index[first])
    opening = report["account"].iloc[0] / (1 + report["return"].iloc[0] - report["cost"].iloc[0])
    opening_account = np.r_[opening, rows["account"].to_numpy()[:-1]]
    for name in ("cost", "turnover"):
        amount = np.diff(rows[f"total_{name}"].to_numpy(), prepend=0.0)
        rows[name] = amount / opening_account
    rows["return"] = rows["account"].to_numpy() / opening_account - 1 + rows["cost"].to_numpy()
    growth = (1 + report["bench"]).groupby(_period_numbers(first, len(report))).prod(min_count=1)
    rows["bench"] = growth.to_numpy() - 1
    return rows


def resample_indicators(indicators: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Aggregate trade indicators to longer periods.

    Amounts, values and counts are summed; the ratios are averaged, weighted by the number of
    orders.
    """
    first, _ = _period_edges(indicators.index, freq)
    period = _period_numbers(first, len(indicators))
    sums = indicators[["deal_amount", "value", "count"]].groupby(period).sum()
    means = indicators[["ffr", "pa", "pos"]].mul(indicators["count"], axis=0)
    means = means.groupby(period).sum().div(sums["count"].where(sums["count"] > 0), axis=0)
    return pd.concat([means, sums], axis=1).set_axis(indicators.index[first])


def _period_edges(dates: pd.Index, freq: str) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers of the first and the last bar of each period."""
    match = re.fullmatch(r"(\d+)(\w+)", period_name(freq))
    assert match is not None
    index = pd.DatetimeIndex(dates)
    period = np.asarray(index.to_period(_UNITS[match[2]]).astype("int64"))
    period = (period - period[0]) // int(match[1])
    change = np.flatnonzero(np.diff(period)) + 1
    return np.r_[0, change], np.r_[change - 1, len(index) - 1]


def _period_numbers(first: np.ndarray, count: int) -> np.ndarray:
    """The period number of each row."""
    starts = np.zeros(count, dtype=np.int64)
    starts[first[1:]] = 1
    return np.cumsum(starts)
