"""How a portfolio is spread: positions, exposure, the largest weight, the effective number."""

from __future__ import annotations

import pandas as pd


def concentration(weight: pd.Series) -> pd.DataFrame:
    """By day, of weights (shares of the account) indexed by (datetime, instrument).

    Columns: num_positions (weights other than 0), gross and net exposure (sum of absolute values;
    sum), largest_weight (absolute), herfindahl (sum of squared shares of the gross exposure) and
    effective_positions, its inverse: as many equal positions are as concentrated. The last two are
    NaN on a day without a position; a day without rows is not there.
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
