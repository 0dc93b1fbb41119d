"""Concentration of a portfolio: positions, exposure, largest weight, effective positions."""

from __future__ import annotations

import pandas as pd


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
