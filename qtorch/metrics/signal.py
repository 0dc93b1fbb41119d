"""Signal quality on pandas Series: daily IC, Rank IC, long-short and average returns, precision.

Series are indexed by (datetime, instrument). Returns are fractions per label horizon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.errors import ArgumentError, DataError

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

HORIZONS = (1, 2, 3, 4, 5, 10, 15, 20)  # bars of the default IC decay
# A standard deviation below this fraction of the mean is rounding error: the values are constant.
_RELATIVE_SPREAD = 1e-14


def calc_ic(
    pred: pd.Series, label: pd.Series, date_col: str = "datetime", dropna: bool = False
) -> tuple[pd.Series, pd.Series]:
    """Daily IC (Pearson) and Rank IC (Spearman) over the instruments.

    Pairs with a NaN are left out; a day with fewer than two pairs, or with a constant score or
    label, is NaN (dropped if `dropna`). Ties get their mean rank. Corresponds to
    qlib/contrib/eva/alpha.py, vectorised over days instead of one Python call per day. Difference:
    a constant day is always NaN, while Qlib's correlation can be a number if the mean is rounded.
    """
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    day_code, days = pd.factorize(frame.index.get_level_values(date_col), sort=True)
    # Both values of an incomplete pair become NaN, so that neither gets a rank.
    frame = frame.mask(frame.isna().any(axis=1))
    ic, rank_ic = (
        pd.Series(_pearson(part.to_numpy(), day_code, len(days)), index=days)
        for part in (frame, frame.groupby(day_code).rank())
    )
    return (ic.dropna(), rank_ic.dropna()) if dropna else (ic, rank_ic)


def calc_long_short_return(
    pred: pd.Series,
    label: pd.Series,
    date_col: str = "datetime",
    quantile: float = 0.2,
    dropna: bool = False,
) -> tuple[pd.Series, pd.Series]:
    """Daily long-short return, and daily return of the equally weighted universe.

    The long and short sides are the top and bottom int(n x quantile) rows of a day by score, with
    n the number of the day's rows; the long-short return is half the difference of their mean
    labels. Rows with equal scores keep their order, NaN scores come last, and NaN labels are
    ignored in the means. `dropna` first drops rows with any NaN. `label` is the raw return.
    Corresponds to qlib/contrib/eva/alpha.py.
    """
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    if dropna:
        frame = frame.dropna()
    day_code, days = pd.factorize(frame.index.get_level_values(date_col), sort=True)
    score, values = frame["pred"].to_numpy(), frame["label"].to_numpy()
    count = np.bincount(day_code, minlength=len(days))
    side_count = (count * quantile).astype(np.int64)
    side_means = []
    day_start = np.cumsum(count) - count  # the position of each day's first row in `order`
    for sign in (-1.0, 1.0):
        # lexsort is stable and puts NaN last for either sign.
        order = np.lexsort((sign * score, day_code))
        ordered_day = day_code[order]
        day_rank = np.arange(len(order)) - day_start[ordered_day]
        side_rows = order[day_rank < side_count[ordered_day]]
        side_means.append(_day_means(values, day_code, side_rows, len(count)))
    long, short = side_means
    average = _day_means(values, day_code, np.arange(len(values)), len(count))
    return pd.Series((long - short) / 2, index=days), pd.Series(average, index=days)


def calc_long_short_prec(
    pred: pd.Series,
    label: pd.Series,
    date_col: str = "datetime",
    quantile: float = 0.2,
    dropna: bool = False,
    is_alpha: bool = False,
) -> tuple[pd.Series, pd.Series]:
    """Daily precision of the long side (share of rises) and of the short side (share of falls).

    The sides are the top and bottom int(n x quantile) rows by score, with n the number of the day's
    rows; `is_alpha` measures labels relative to the day's mean. Rows with a NaN label are ignored.
    Corresponds to qlib/contrib/eva/alpha.py. Raises DataError if no day has 1 / quantile rows.
    """
    if is_alpha:
        label = label - label.groupby(level=date_col).transform("mean")
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    if dropna:
        frame = frame.dropna()
    by_day = frame.groupby(level=date_col)["pred"]
    side_count = (by_day.transform("size") * quantile).astype(np.int64)
    if not side_count.any():
        raise DataError(
            f"precision needs days with at least {math.ceil(1 / quantile)} instruments; the "
            f"largest day has {int(by_day.size().max()) if len(frame) else 0}."
        )
    precisions = []
    for ascending, sign in ((False, 1.0), (True, -1.0)):
        day_rank = by_day.rank(method="first", ascending=ascending)
        side_label = frame["label"][(day_rank <= side_count) & frame["label"].notna()]
        precisions.append((sign * side_label > 0).groupby(level=date_col).mean())
    return precisions[0], precisions[1]


def mean_over_std(series: pd.Series) -> float:
    """Mean / standard deviation (ddof 1), ignoring NaN; for a daily IC this is the ICIR.

    NaN if the values are constant, also if rounding gives them a tiny standard deviation.
    """
    mean, std = float(series.mean()), float(series.std(ddof=1))
    return mean / std if std > _RELATIVE_SPREAD * abs(mean) else math.nan


def annual_return(series: pd.Series, ann_scaler: float = 252) -> float:
    """Annual return of daily returns, summed rather than compounded: mean x `ann_scaler`."""
    return float(series.mean()) * ann_scaler


def annual_sharpe(series: pd.Series, ann_scaler: float = 252) -> float:
    """Annual Sharpe ratio: mean / standard deviation (ddof 1) x sqrt(`ann_scaler`)."""
    return mean_over_std(series) * math.sqrt(ann_scaler)


def quantile_returns(score: pd.Series, label: pd.Series, num_quantiles: int = 5) -> pd.DataFrame:
    """Mean label by day and score quantile: columns 1 (the lowest scores) to `num_quantiles`.

    Among the n instruments of a day that have both a score and a label, the one with rank r (from
    0) belongs to quantile 1 + floor(r x num_quantiles / n); equal scores keep their order. A day
    with fewer instruments than quantiles is NaN. Returns are fractions per label horizon.
    """
    if num_quantiles < 2:
        raise ArgumentError(f"num_quantiles={num_quantiles}: expected at least 2.")
    pairs = pd.DataFrame({"score": score, "label": label}).astype(np.float64).dropna()
    days = pairs.index.get_level_values("datetime")
    by_day = pairs["score"].groupby(days)
    rank = by_day.rank(method="first").to_numpy().astype(np.int64) - 1
    count = by_day.transform("size").to_numpy().astype(np.int64)
    group = 1 + rank * num_quantiles // np.maximum(count, 1)
    means = pairs["label"].groupby([days, group]).mean().unstack()
    means = means.reindex(columns=range(1, num_quantiles + 1))
    has_enough = by_day.size().reindex(means.index) >= num_quantiles
    return means.where(has_enough, axis=0).rename_axis(index="datetime", columns="quantile")


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


def shift_days(values: pd.Series, days: int) -> pd.Series:
    """Give each (datetime, instrument) the value of `days` trading days later (negative: earlier).

    The trading days are the dates of `values`. Rows that would fall outside them are dropped.
    """
    dates = values.index.get_level_values("datetime")
    calendar = dates.unique().sort_values()
    day_index = calendar.get_indexer(dates) - days
    inside = (day_index >= 0) & (day_index < len(calendar))
    shifted_dates = calendar[day_index[inside]]
    instruments = values.index.get_level_values("instrument")[inside]
    index = pd.MultiIndex.from_arrays(
        [shifted_dates, instruments], names=["datetime", "instrument"]
    )
    return pd.Series(values.to_numpy()[inside], index)


def _day_means(values: Floats, day_code: Numbers, rows: Numbers, num_days: int) -> Floats:
    """Return the mean of the values in `rows` on each day, without NaN; NaN if none is left."""
    rows = rows[~np.isnan(values[rows])]
    total = np.bincount(day_code[rows], weights=values[rows], minlength=num_days).astype(np.float64)
    count = np.bincount(day_code[rows], minlength=num_days)
    out: Floats = np.divide(total, count, out=np.full(num_days, np.nan), where=count > 0)
    return out


def _pearson(pairs: Floats, day_code: Numbers, num_days: int) -> Floats:
    """Return the correlation of `pairs [S, 2]` on each day; an incomplete pair is NaN in both."""
    is_valid = ~np.isnan(pairs[:, 0])
    pairs, day_code = pairs[is_valid], day_code[is_valid]
    count = np.bincount(day_code, minlength=num_days)
    safe_count = np.maximum(count, 1)

    def day_sums(values: Floats) -> Floats:
        sums: Floats = np.bincount(day_code, weights=values, minlength=num_days).astype(np.float64)
        return sums

    means = [day_sums(pairs[:, k]) / safe_count for k in (0, 1)]
    dx, dy = (pairs[:, k] - means[k][day_code] for k in (0, 1))
    squares = [day_sums(d * d) for d in (dx, dy)]
    is_constant = [
        s <= safe_count * (_RELATIVE_SPREAD * m) ** 2 for s, m in zip(squares, means, strict=True)
    ]
    is_defined = (count > 1) & ~is_constant[0] & ~is_constant[1]
    scale = np.sqrt(squares[0]) * np.sqrt(squares[1])
    out = np.divide(day_sums(dx * dy), scale, out=np.full(num_days, np.nan), where=is_defined)
    correlations: Floats = np.clip(out, -1.0, 1.0)
    return correlations
