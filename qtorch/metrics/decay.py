"""Persistence of a signal: IC decay by horizon and autocorrelation of the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from qtorch.core.errors import ArgumentError
from qtorch.metrics.signal import calc_ic

HORIZONS = (1, 2, 3, 4, 5, 10, 15, 20)


def shift_days(values: pd.Series, days: int) -> pd.Series:
    """Give each (datetime, instrument) the value of `days` trading days later (negative: earlier).

    The trading days are the dates of `values`. Rows that would fall outside them are dropped.
    """
    dates = values.index.get_level_values("datetime")
    calendar = dates.unique().sort_values()
    day_index = calendar.get_indexer(dates) - days
    inside = (day_index >= 0) & (day_index < len(calendar))
    shifted_dates = calendar[day_index[inside]]
    names = values.index.get_level_values("instrument")[inside]
    index = pd.MultiIndex.from_arrays([shifted_dates, names], names=["datetime", "instrument"])
    return pd.Series(values.to_numpy()[inside], index)


def ic_decay(
    score: pd.Series, label: pd.Series, horizons: Sequence[int] = HORIZONS
) -> pd.DataFrame:
    """IC and Rank IC between a day's scores and the label h - 1 trading days later, for each h.

    If the label is a one-day return, horizon h measures the h-th day after the score alone, without
    overlap; h = 1 is the usual IC. Pairs need a score on the day and a label on the later day.
    Columns: ic, rank_ic (means over days), ic_error, rank_ic_error (standard errors: std /
    sqrt(days)) and days (the number of days, fewer for longer horizons).
    """
    if not horizons or min(horizons) < 1:
        raise ArgumentError(f"horizons={list(horizons)}: expected whole numbers of at least 1.")
    rows = {}
    for horizon in horizons:
        daily_ics = calc_ic(
            score, label if horizon == 1 else shift_days(label, horizon - 1), dropna=True
        )
        row: dict[str, float] = {}
        for name, daily in zip(("ic", "rank_ic"), daily_ics, strict=True):
            row[name] = float(daily.mean())
            row[f"{name}_error"] = float(daily.std(ddof=1)) / math.sqrt(max(len(daily), 1))
        rows[horizon] = row | {"days": len(daily_ics[0])}
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"days": int})
    return table.rename_axis("horizon")


def score_autocorrelation(score: pd.Series, lag: int = 1) -> pd.Series:
    """Rank correlation of each day's scores with the scores `lag` trading days earlier.

    Computed over the instruments with both scores; the first `lag` days have no value and are
    dropped. Near 1 the signal causes little turnover; near 0 the ranking is new every day.
    """
    if lag < 1:
        raise ArgumentError(f"lag={lag}: expected a whole number of at least 1.")
    return calc_ic(score, shift_days(score, -lag), dropna=True)[1]
