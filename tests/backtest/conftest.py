"""What the tests of backtests share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def days():
    return pd.bdate_range("2020-01-01", periods=12)


@pytest.fixture(scope="session")
def wild_market():
    from qtorch.data import SyntheticSource

    return SyntheticSource(24, "2019-01-01", "2019-06-28", seed=5)


@pytest.fixture(scope="session")
def wild_scores(wild_market):
    names = sorted(wild_market.instruments("stocks"))
    dates = wild_market.calendar()
    random = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    found = pd.Series(random.standard_normal(len(index)), index=index, name="score")
    return found[random.random(len(index)) > 0.05]
