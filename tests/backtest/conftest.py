"""Fixtures shared by the backtest tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def days():
    return pd.bdate_range("2020-01-01", periods=12)


@pytest.fixture(scope="session")
def synthetic_market():
    from qtorch.data import SyntheticSource

    return SyntheticSource(24, "2019-01-01", "2019-06-28", seed=5)


@pytest.fixture(scope="session")
def random_scores(synthetic_market):
    names = sorted(synthetic_market.instruments("stocks"))
    dates = synthetic_market.calendar()
    random = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    scores = pd.Series(random.standard_normal(len(index)), index=index, name="score")
    return scores[random.random(len(index)) > 0.05]
