"""A test signal with ties, NaN, days of different sizes and a day of constant scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest


def build_signal(num_days: int = 8, num_instruments: int = 23) -> pd.DataFrame:
    """Columns pred and label; rounded, so that there are ties."""
    rng = np.random.RandomState(7)
    days = pd.date_range("2020-01-01", periods=num_days, name="datetime")
    names = [f"S{k:02d}" for k in range(num_instruments)]
    index = pd.MultiIndex.from_product([days, names], names=["datetime", "instrument"])
    frame = pd.DataFrame({"pred": np.round(rng.randn(len(index)), 1)}, index=index)
    frame["label"] = np.round(0.3 * frame["pred"] + rng.randn(len(index)), 2)
    frame.loc[rng.rand(len(index)) < 0.1, "label"] = np.nan
    frame.loc[rng.rand(len(index)) < 0.05, "pred"] = np.nan
    frame.loc[days[2], "pred"] = 0.5
    frame = frame.drop(index=[(days[3], n) for n in names[3:]])
    frame = frame.drop(index=[(days[4], n) for n in names[1:]])
    frame.loc[(days[5], slice(None)), "label"] = np.nan
    return frame


@pytest.fixture(scope="session")
def signal() -> pd.DataFrame:
    return build_signal()
