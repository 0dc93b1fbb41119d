"""Figures of a portfolio: trade indicators and concentration of its weights."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from qtorch.core.errors import check_name


def indicator_analysis(
    df: pd.DataFrame, method: Literal["mean", "amount_weighted", "value_weighted"] = "mean"
) -> pd.DataFrame:
    """Average the trade indicators ffr, pa and pos over all bars.

    `df` has one row per bar with `ffr` (fulfilled fraction of the ordered amounts), `pa` (price
    advantage), `pos` (share of orders with a positive price advantage), `count`, `deal_amount` and
    `value` of the orders. `method` weights ffr and pa by the number of orders ("mean") or by the
    traded amount or value; pos is always weighted by the number of orders. Bars without orders are
    ignored. Returns a frame with one column "value". Corresponds to qlib/contrib/evaluate.py.
    """
    weights = {"mean": "count", "amount_weighted": "deal_amount", "value_weighted": "value"}
    check_name("method of indicator_analysis", method, weights)
    averages = {}
    for name, column in (("ffr", weights[method]), ("pa", weights[method]), ("pos", "count")):
        weight = df[column].abs()
        averages[name] = float(np.divide((df[name] * weight).sum(), weight.sum()))
    return pd.Series(averages).to_frame("value")


def concentration(weight: pd.Series) -> pd.DataFrame:
    """Daily concentration of weights (fractions of the account) by (datetime, instrument).

    Columns: num_positions (non-zero weights), gross and net exposure (sum of absolute weights, sum
    of weights), largest_weight (absolute), herfindahl (sum of squared fractions of the gross
    exposure) and effective_positions (its inverse: the number of equal positions with the same
    concentration). The last two are NaN on days without positions; days without rows are omitted.
    """
    weight = weight.dropna()
    days = weight.index.get_level_values("datetime")
    size = weight.abs()
    gross = size.groupby(days).sum()
    herfindahl = (size**2).groupby(days).sum() / (gross**2).where(gross > 0)
    return pd.DataFrame(
        {
            "num_positions": (size > 0).groupby(days).sum(),
            "gross": gross,
            "net": weight.groupby(days).sum(),
            "largest_weight": size.groupby(days).max(),
            "herfindahl": herfindahl,
            "effective_positions": 1 / herfindahl,
        }
    ).rename_axis("datetime")
