"""Signal quality on pandas Series: daily IC, Rank IC, long-short and average returns, precision.

Series are indexed by (datetime, instrument). Returns are fractions per label horizon.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.errors import DataError

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

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
    days = _days(frame, date_col)
    frame = frame.mask(frame.isna().any(axis=1))
    day_code, index = days.codes.astype(np.int64), _index(days, date_col)
    rank_frame = frame.groupby(day_code).rank()
    ic, rank_ic = (
        pd.Series(_pearson(part.to_numpy(), day_code, len(days.categories)), index=index)
        for part in (frame, rank_frame)
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
    days = _days(frame, date_col)
    day_code, values = days.codes.astype(np.int64), frame["label"].to_numpy()
    score = frame["pred"].to_numpy()
    count = np.bincount(day_code, minlength=len(days.categories))
    side_count = (count * quantile).astype(np.int64)
    side_means = []
    for sign in (-1.0, 1.0):
        # lexsort is stable and puts NaN last for either sign.
        order = np.lexsort((sign * score, day_code))
        day_rank = np.arange(len(order)) - (np.cumsum(count) - count)[day_code[order]]
        side_means.append(
            _day_means(values, day_code, order[day_rank < side_count[day_code[order]]], len(count))
        )
    long, short = side_means
    average = _day_means(values, day_code, np.arange(len(values)), len(count))
    index = _index(days, date_col)
    return pd.Series((long - short) / 2, index=index), pd.Series(average, index=index)


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
    """Mean / standard deviation (ddof 1), ignoring NaN; for a daily IC this is the ICIR."""
    std = float(series.std(ddof=1))
    return float(series.mean()) / std if std > 0 else math.nan


def annual_return(series: pd.Series, ann_scaler: float = 252) -> float:
    """Annual return of daily returns, summed rather than compounded: mean x `ann_scaler`."""
    return float(series.mean()) * ann_scaler


def annual_sharpe(series: pd.Series, ann_scaler: float = 252) -> float:
    """Annual Sharpe ratio: mean / standard deviation (ddof 1) x sqrt(`ann_scaler`)."""
    return mean_over_std(series) * math.sqrt(ann_scaler)


def _days(frame: pd.DataFrame, date_col: str) -> pd.Categorical:
    return pd.Categorical(frame.index.get_level_values(date_col))


def _index(days: pd.Categorical, name: str) -> pd.Index:
    index: pd.Index = pd.Index(days.categories, name=name)
    return index


def _day_means(values: Floats, day_code: Numbers, rows: Numbers, num_days: int) -> Floats:
    rows = rows[~np.isnan(values[rows])]
    total = np.bincount(day_code[rows], weights=values[rows], minlength=num_days).astype(np.float64)
    count = np.bincount(day_code[rows], minlength=num_days)
    out: Floats = np.divide(total, count, out=np.full(num_days, np.nan), where=count > 0)
    return out


def _pearson(pairs: Floats, day_code: Numbers, num_days: int) -> Floats:
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
