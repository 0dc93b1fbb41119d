from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.data import LiquidityWeight, SyntheticSource, TimeDecay, VolatilityWeight
from qtorch.data.dataset.reweighter import ExpressionWeight, validate_weights


@pytest.fixture(scope="module")
def source() -> SyntheticSource:
    return SyntheticSource(num_instruments=12, start_time="2019-01-01", end_time="2019-06-30")


@pytest.fixture(scope="module")
def data(source: SyntheticSource) -> pd.DataFrame:
    close = source.features("all", ["$close"], "2019-04-01", "2019-05-31").swaplevel().sort_index()
    return close.dropna()


def test_time_decay_counts_trading_days(data: pd.DataFrame) -> None:
    weight = TimeDecay(half_life=10).reweight(data)
    days = weight.index.get_level_values(0)
    assert (weight[days == days.unique()[-1]] == 1).all()
    assert weight[days == days.unique()[-11]].to_numpy() == pytest.approx(0.5)
    assert TimeDecay(half_life=1, floor=0.2).reweight(data).min() == 0.2
    with pytest.raises(ConfigError, match="half_life"):
        TimeDecay(half_life=0)


def test_calm_instruments_weigh_more_without_look_ahead(
    source: SyntheticSource, data: pd.DataFrame
) -> None:
    weight = VolatilityWeight(window=10, source=source).reweight(data)
    close = source.features("all", ["$close"]).iloc[:, 0].unstack(0)
    returns = close / close.shift(1) - 1
    std = returns.rolling(10, min_periods=1).std().stack().reindex(data.index)
    ratio = std / std.groupby(level=0).transform("median")
    expected_weight = (1 / ratio).clip(0.1, 10)
    has_full_window = returns.notna().rolling(10).sum().stack().reindex(data.index) == 10
    assert np.allclose(weight[has_full_window], expected_weight[has_full_window], rtol=1e-3)
    early = data[data.index.get_level_values(0) < "2019-05-01"]
    early_weight = VolatilityWeight(window=10, source=source).reweight(early)
    pd.testing.assert_series_equal(early_weight, weight.reindex(early.index))
    assert len(validate_weights(weight, data.index)) == len(data)


def test_liquid_instruments_weigh_more(source: SyntheticSource, data: pd.DataFrame) -> None:
    weight = LiquidityWeight(source=source).reweight(data)
    mean_amount = source.features("all", ["Mean($close*$volume, 20)"]).iloc[:, 0].swaplevel()
    ranks = pd.concat([weight, mean_amount.reindex(data.index)], axis=1).groupby(level=0).rank()
    assert ranks.corr().iloc[0, 1] > 0.95


def test_invalid_expressions_are_refused(source: SyntheticSource, data: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="negative"):
        ExpressionWeight("0 - $close", source=source).reweight(data)
    with pytest.raises(DataError, match="volum"):
        ExpressionWeight("$volum", source=source).reweight(data)
    with pytest.raises(ConfigError, match="limit"):
        ExpressionWeight("$close", limit=0.5)
