"""Alpha101 in plain pandas and numpy, slow and independent of the expression language.

The formulas of alpha101_formulas.txt are those of the appendix of Kakushadze (2016), "101
Formulaic Alphas", with Python's spelling of powers, `where` for the ternary operator and `|` for
"or". Every frame is `[dates, instruments]`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

FORMULAS = Path(__file__).with_name("alpha101_formulas.txt").read_text().splitlines()


def alpha101_frames(
    bars: dict[str, pd.DataFrame], members: pd.DataFrame, groups: dict[str, pd.DataFrame]
) -> list[pd.DataFrame]:
    """Compute all alphas from bars by field; `groups` may lack the classifications."""
    names: dict[str, Any] = {**FUNCTIONS, **bars}
    names["returns"] = bars["close"] / bars["close"].shift(1) - 1
    names["cap"] = bars.get("cap", 1.0)
    for days in (5, 10, 15, 20, 30, 40, 50, 60, 81, 120, 150, 180):
        names[f"adv{days}"] = _rolling(bars["close"] * bars["volume"], days, np.nanmean)
    names |= {
        "rank": lambda x: _members(x, members).rank(axis=1, pct=True),
        "scale": lambda x: _by_day(x, members, lambda d: d.div(d.abs().sum(axis=1), axis=0)),
        "IndNeutralize": lambda x, group: _neutralise(x, members, groups.get(group)),
        "IndClass": SimpleNamespace(
            sector="sector", industry="industry", subindustry="subindustry"
        ),
    }
    with np.errstate(all="ignore"):
        return [_number(eval(text, {}, names)) for text in FORMULAS]


def _number(x: pd.DataFrame) -> pd.DataFrame:
    return x.astype(float)


def _finite(x: pd.DataFrame) -> pd.DataFrame:
    return _number(x).replace([np.inf, -np.inf], np.nan)


def _members(x: pd.DataFrame, members: pd.DataFrame) -> pd.DataFrame:
    return _number(x).where(members)


def _by_day(x: pd.DataFrame, members: pd.DataFrame, function: Any) -> pd.DataFrame:
    return function(_finite(_members(x, members)))


def _neutralise(x: pd.DataFrame, members: pd.DataFrame, group: pd.DataFrame | None) -> pd.DataFrame:
    x = _finite(_members(x, members))
    if group is None:
        return x.sub(x.mean(axis=1), axis=0)
    result = x * np.nan
    for code in np.unique(group.to_numpy()):
        part = x.where(group == code)
        result = result.fillna(part.sub(part.mean(axis=1), axis=0))
    return result


def _windows(x: pd.DataFrame, days: float) -> np.ndarray:
    """Return `[dates, instruments, days]`, NaN before the first date; infinity is missing."""
    days = int(days)
    values = _finite(x).to_numpy()
    padded = np.concatenate([np.full((days - 1, values.shape[1]), np.nan), values])
    return np.lib.stride_tricks.sliding_window_view(padded, days, axis=0)


def _rolling(x: pd.DataFrame, days: float, function: Any) -> pd.DataFrame:
    windows = _windows(x, days)
    result = np.full(windows.shape[:2], np.nan)
    for cell in np.ndindex(*result.shape):
        if not np.isnan(windows[cell]).all():
            result[cell] = function(windows[cell])
    return pd.DataFrame(result, x.index, x.columns)


def _pairs(x: pd.DataFrame, y: pd.DataFrame, days: float, function: Any) -> pd.DataFrame:
    left, right = _windows(x, days), _windows(y, days)
    result = np.full(left.shape[:2], np.nan)
    for cell in np.ndindex(*result.shape):
        is_pair = ~np.isnan(left[cell]) & ~np.isnan(right[cell])
        if is_pair.sum() > 1:
            result[cell] = function(left[cell][is_pair], right[cell][is_pair])
    return pd.DataFrame(result, x.index, x.columns)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if min(x.std(ddof=1), y.std(ddof=1)) <= 2e-5:
        return np.nan
    if len(x) == 2:
        return float(np.sign(np.diff(x) * np.diff(y))[0])
    return float(np.corrcoef(x, y)[0, 1])


def _covariance(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1))


def _last_rank(window: np.ndarray) -> float:
    last, values = window[-1], window[~np.isnan(window)]
    if np.isnan(last):
        return np.nan
    return ((values < last).sum() + ((values == last).sum() + 1) / 2) / len(values)


def _decay(window: np.ndarray) -> float:
    valid = ~np.isnan(window)
    weights = np.arange(1.0, len(window) + 1)[valid]
    return float((weights * window[valid]).sum() / weights.sum())


def _position(extreme: Any) -> Any:
    """Count the positions from the first date if the window is not full."""

    def function(x: pd.DataFrame, days: float) -> pd.DataFrame:
        result = _rolling(x, days, lambda w: extreme(w) + 1)
        missing = np.maximum(int(days) - 1 - np.arange(len(x)), 0)
        return result.sub(missing, axis=0)

    return function


def _if_else(condition: pd.DataFrame, x: Any, y: Any) -> pd.DataFrame:
    x, y = (v if isinstance(v, pd.DataFrame) else condition * 0.0 + v for v in (x, y))
    return x.where(condition, y)


FUNCTIONS: dict[str, Any] = {
    "abs": lambda x: x.abs(),
    "sign": np.sign,
    "log": np.log,
    "where": _if_else,
    "SignedPower": lambda x, power: np.sign(x) * x.abs() ** power,
    "min": lambda x, y: x.where(x <= y, y).where(x.notna() & y.notna()),
    "max": lambda x, y: x.where(x >= y, y).where(x.notna() & y.notna()),
    "delay": lambda x, days: x.shift(int(days)),
    "delta": lambda x, days: x - x.shift(int(days)),
    "sum": lambda x, days: _rolling(x, days, np.nansum),
    "product": lambda x, days: _rolling(x, days, np.nanprod),
    "stddev": lambda x, days: _rolling(x, days, lambda w: pd.Series(w).std()),
    "ts_min": lambda x, days: _rolling(x, days, np.nanmin),
    "ts_max": lambda x, days: _rolling(x, days, np.nanmax),
    "Ts_Rank": lambda x, days: _rolling(x, days, _last_rank),
    "Ts_ArgMax": _position(np.nanargmax),
    "Ts_ArgMin": _position(np.nanargmin),
    "correlation": lambda x, y, days: _pairs(x, y, days, _correlation),
    "covariance": lambda x, y, days: _pairs(x, y, days, _covariance),
    "decay_linear": lambda x, days: _rolling(x, days, _decay),
}
