"""How long a signal lasts: IC by horizon, and how much today's scores are yesterday's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.metrics.signal import calc_ic

HORIZONS = (1, 2, 3, 4, 5, 10, 15, 20)


def later(values: pd.Series, days: int) -> pd.Series:
    """At each (datetime, instrument) the value of `days` trading days later; below 0: earlier.

    The trading days are the dates of `values`. Rows whose day falls outside them are left out.
    """
    dates = values.index.get_level_values("datetime")
    calendar = dates.unique().sort_values()
    place = calendar.get_indexer(dates) - days
    inside = (place >= 0) & (place < len(calendar))
    moved = calendar[place[inside]]
    names = values.index.get_level_values("instrument")[inside]
    index = pd.MultiIndex.from_arrays([moved, names], names=["datetime", "instrument"])
    return pd.Series(values.to_numpy()[inside], index)


def ic_decay(
    score: pd.Series, label: pd.Series, horizons: Sequence[int] = HORIZONS
) -> pd.DataFrame:
    """IC and Rank IC of a day's scores with the label of h - 1 trading days later, by h.

    Where the label is the return of one day, horizon h is the h-th day that a score could earn,
    and that day alone: nothing overlaps, and h = 1 is the signal's own IC. An instrument counts
    that has a score on the day and a label later. Columns ic, rank_ic (means over days), ic_error,
    rank_ic_error (standard errors: std / sqrt(days)) and days, which are fewer for a longer
    horizon.
    """
    if not horizons or min(horizons) < 1:
        raise ArgumentError(f"horizons={list(horizons)}: expected whole numbers from 1.")
    rows = {}
    for horizon in horizons:
        both = calc_ic(score, label if horizon == 1 else later(label, horizon - 1), dropna=True)
        row: dict[str, float] = {}
        for name, daily in zip(("ic", "rank_ic"), both, strict=True):
            row[name] = float(daily.mean())
            row[f"{name}_error"] = float(daily.std(ddof=1)) / math.sqrt(max(len(daily), 1))
        rows[horizon] = row | {"days": len(both[0])}
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"days": int})
    return table.rename_axis("horizon")


def score_autocorrelation(score: pd.Series, lag: int = 1) -> pd.Series:
    """Rank correlation of each day's scores with those of `lag` trading days before.

    Over the instruments that have both; the first `lag` days have none and are left out. Near 1
    the signal hardly trades; near 0 it is another one each day.
    """
    if lag < 1:
        raise ArgumentError(f"lag={lag}: expected a whole number from 1.")
    return calc_ic(score, later(score, -lag), dropna=True)[1]
