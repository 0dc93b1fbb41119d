"""How good a signal is, on pandas Series: daily IC, Rank IC, long-short and long-average returns.

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

# A spread below this share of the values' size is the rounding of the mean, not a spread.
_RELATIVE_SPREAD = 1e-14


def calc_ic(
    pred: pd.Series, label: pd.Series, date_col: str = "datetime", dropna: bool = False
) -> tuple[pd.Series, pd.Series]:
    """IC (Pearson) and Rank IC (Spearman) of each day over its instruments.

    Pairs with a NaN are left out; a day with fewer than two, or with a constant side, has NaN
    (kept unless `dropna`). Ranks of ties are averaged. Answers to qlib/contrib/eva/alpha.py, with
    all days at once instead of a Python call a day. Difference: a constant day is NaN also where
    the mean's rounding makes Qlib's correlation some number.
    """
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    days = _days(frame, date_col)
    frame = frame.mask(frame.isna().any(axis=1))
    code, index = days.codes.astype(np.int64), _index(days, date_col)
    ranked = frame.groupby(code).rank()
    ic, rank_ic = (
        pd.Series(_pearson(part.to_numpy(), code, len(days.categories)), index=index)
        for part in (frame, ranked)
    )
    return (ic.dropna(), rank_ic.dropna()) if dropna else (ic, rank_ic)


def calc_long_short_return(
    pred: pd.Series,
    label: pd.Series,
    date_col: str = "datetime",
    quantile: float = 0.2,
    dropna: bool = False,
) -> tuple[pd.Series, pd.Series]:
    """Daily long-short return and daily return of the equal-weight universe.

    Long and short are the top and the bottom int(n x quantile) of a day by score, n the day's
    rows; the long-short return is half the difference of their mean labels. Rows of equal score
    are taken in their order, a NaN score comes last, NaN labels do not count in a mean. `dropna`
    drops rows with any NaN first. `label` is the raw return. Answers to
    qlib/contrib/eva/alpha.py.
    """
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    if dropna:
        frame = frame.dropna()
    days = _days(frame, date_col)
    code, values = days.codes.astype(np.int64), frame["label"].to_numpy()
    score = frame["pred"].to_numpy()
    count = np.bincount(code, minlength=len(days.categories))
    chosen = (count * quantile).astype(np.int64)
    ends = []
    for sign in (-1.0, 1.0):
        # lexsort is stable and puts NaN last, whatever the sign.
        order = np.lexsort((sign * score, code))
        place = np.arange(len(order)) - (np.cumsum(count) - count)[code[order]]
        ends.append(_mean(values, code, order[place < chosen[code[order]]], len(count)))
    long, short = ends
    average = _mean(values, code, np.arange(len(values)), len(count))
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
    """The shares of a day's top scores with a rise and of its bottom scores with a fall.

    Top and bottom are int(n x quantile) by score, n the day's rows; `is_alpha` measures labels
    from the day's mean. Rows with a NaN label do not count. Answers to qlib/contrib/eva/alpha.py.
    Raises DataError where no day has 1 / quantile rows.
    """
    if is_alpha:
        label = label - label.groupby(level=date_col).transform("mean")
    frame = pd.DataFrame({"pred": pred, "label": label}).astype(np.float64)
    if dropna:
        frame = frame.dropna()
    by_day = frame.groupby(level=date_col)["pred"]
    chosen = (by_day.transform("size") * quantile).astype(np.int64)
    if not chosen.any():
        raise DataError(
            f"precision needs days of {math.ceil(1 / quantile)} instruments or more; the largest "
            f"has {int(by_day.size().max()) if len(frame) else 0}."
        )
    found = []
    for ascending, sign in ((False, 1.0), (True, -1.0)):
        place = by_day.rank(method="first", ascending=ascending)
        end = frame["label"][(place <= chosen) & frame["label"].notna()]
        found.append((sign * end > 0).groupby(level=date_col).mean())
    return found[0], found[1]


def mean_over_std(series: pd.Series) -> float:
    """Mean / standard deviation (ddof 1) of what is there: ICIR, the ratio of a daily IC."""
    std = float(series.std(ddof=1))
    return float(series.mean()) / std if std > 0 else math.nan


def annual_return(series: pd.Series, ann_scaler: float = 252) -> float:
    """Mean x `ann_scaler`: the annual return of daily returns, summed and not compounded."""
    return float(series.mean()) * ann_scaler


def annual_sharpe(series: pd.Series, ann_scaler: float = 252) -> float:
    """Mean / standard deviation (ddof 1) x sqrt(`ann_scaler`)."""
    return mean_over_std(series) * math.sqrt(ann_scaler)


def _days(frame: pd.DataFrame, date_col: str) -> pd.Categorical:
    return pd.Categorical(frame.index.get_level_values(date_col))


def _index(days: pd.Categorical, name: str) -> pd.Index:
    index: pd.Index = pd.Index(days.categories, name=name)
    return index


def _mean(values: Floats, code: Numbers, rows: Numbers, num_days: int) -> Floats:
    rows = rows[~np.isnan(values[rows])]
    total = np.bincount(code[rows], weights=values[rows], minlength=num_days).astype(np.float64)
    count = np.bincount(code[rows], minlength=num_days)
    out: Floats = np.divide(total, count, out=np.full(num_days, np.nan), where=count > 0)
    return out


def _pearson(pairs: Floats, code: Numbers, num_days: int) -> Floats:
    there = ~np.isnan(pairs[:, 0])
    pairs, code = pairs[there], code[there]
    count = np.bincount(code, minlength=num_days)
    some = np.maximum(count, 1)

    def summed(values: Floats) -> Floats:
        sums: Floats = np.bincount(code, weights=values, minlength=num_days).astype(np.float64)
        return sums

    means = [summed(pairs[:, k]) / some for k in (0, 1)]
    dx, dy = (pairs[:, k] - means[k][code] for k in (0, 1))
    spread = [summed(d * d) for d in (dx, dy)]
    flat = [s <= some * (_RELATIVE_SPREAD * m) ** 2 for s, m in zip(spread, means, strict=True)]
    defined = (count > 1) & ~flat[0] & ~flat[1]
    scale = np.sqrt(spread[0]) * np.sqrt(spread[1])
    out = np.divide(summed(dx * dy), scale, out=np.full(num_days, np.nan), where=defined)
    clipped: Floats = np.clip(out, -1.0, 1.0)
    return clipped
