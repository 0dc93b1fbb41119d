"""Mean returns by score quantile: with a good signal they increase from quantile to quantile."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qtorch.core.errors import ArgumentError


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
