from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.data import (
    DataHandlerLP,
    DatasetH,
    FrameSource,
    LiquidityWeight,
    NestedDataLoader,
    QlibDataLoader,
    SyntheticSource,
    TimeDecay,
    VolatilityWeight,
)
from qtorch.data.dataset.reweighter import ExpressionWeight, Reweighter, validate_weights
from qtorch.data.handler.loader import ChangedLoader
from qtorch.data.source.changed import FutureChange
from qtorch.task.rolling import task_source

INDEX = pd.MultiIndex.from_product(
    [pd.bdate_range("2020-01-01", periods=2), ["A", "B"]], names=["datetime", "instrument"]
)


class Recent(Reweighter):
    """Halve the weight with each `half_life` days of age."""

    def __init__(self, half_life: float = 1.0) -> None:
        self.half_life = half_life

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        age = (data.index.get_level_values(0).max() - data.index.get_level_values(0)).days
        return pd.Series(0.5 ** (age / self.half_life), index=data.index)


def test_a_user_defined_reweighter():
    data = pd.DataFrame({("label", "L"): np.arange(4.0)}, index=INDEX)
    weights = validate_weights(Recent(half_life=1.0).reweight(data), INDEX)
    assert weights.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert weights.dtype == torch.float32
    assert Recent(half_life=2.0).to_config()["half_life"] == 2.0
    with pytest.raises(ArgumentError, match="half_life"):
        Recent(halflife=2.0)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, pd.array])
def test_weights_in_any_form(form):
    assert validate_weights(form([1.0, 2.0, 0.0, 3.0]), INDEX).tolist() == [1.0, 2.0, 0.0, 3.0]


def test_a_series_is_aligned_by_its_index():
    series = pd.Series([1.0, 2.0, 3.0, 4.0], index=INDEX)[::-1]
    assert validate_weights(series, INDEX).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert validate_weights(series.to_frame(), INDEX).tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 4 samples"),
        ([1.0, 2.0, np.nan, 1.0], "1 missing, negative or infinite weights"),
        ([1.0, -2.0, -1.0, 1.0], "2 missing, negative or infinite weights"),
        ([1.0, 2.0, np.inf, 1.0], "infinite"),
        ([0.0] * 4, "weight 0 for every sample"),
    ],
)
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(DataError, match=message):
        validate_weights(weights, INDEX)


def test_a_series_without_some_samples_is_refused():
    with pytest.raises(DataError, match="1 missing, negative or infinite weights"):
        validate_weights(pd.Series([1.0, 1.0, 1.0], index=INDEX[:3]), INDEX)


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


def test_the_own_source_of_a_loader_is_that_of_the_weights(
    source: SyntheticSource, data: pd.DataFrame
) -> None:
    loader = QlibDataLoader({"feature": ["$close"], "label": ["$open"]}, source=source)
    loaders = (loader, NestedDataLoader([loader]), ChangedLoader(loader, FutureChange()))
    for each in loaders:
        handler = DataHandlerLP("all", data_loader=each)
        assert handler.source is None
        assert handler.bars_source() is source
        assert handler.frequency() == "day"
        assert task_source({"dataset": {"kwargs": {"handler": handler}}}) is source
        reweighter = LiquidityWeight()
        reweighter.bind(DatasetH(handler, {"train": ("2019-04-01", "2019-05-31")}))
        expected = LiquidityWeight(source=source).reweight(data)
        pd.testing.assert_series_equal(reweighter.reweight(data), expected)


def test_invalid_expressions_are_refused(source: SyntheticSource, data: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="negative"):
        ExpressionWeight("0 - $close", source=source).reweight(data)
    with pytest.raises(DataError, match="volum"):
        ExpressionWeight("$volum", source=source).reweight(data)
    with pytest.raises(ConfigError, match="limit"):
        ExpressionWeight("$close", limit=0.5)


# -- bars within a day -----------------------------------------------------------------------------


def intraday_dataset(loader_freq: str | None = None) -> DatasetH:
    days = pd.bdate_range("2024-01-02", periods=10)
    stamps = [d + pd.Timedelta(minutes=m) for d in days for m in (600, 630, 660, 690)]
    index = pd.MultiIndex.from_product([stamps, list("ABCD")], names=["datetime", "instrument"])
    rng = np.random.default_rng(0)
    close = 10 * np.exp(rng.normal(0, 0.01, (40, 4)).cumsum(0)).ravel()
    frame = pd.DataFrame({"close": close, "volume": rng.uniform(1e5, 2e5, 160)}, index)
    config = {"feature": ["$close"], "label": ["Ref($close, -1)/$close-1"]}
    loader = QlibDataLoader(config, freq=loader_freq)
    handler = DataHandlerLP("all", data_loader=loader, source=FrameSource(frame))
    return DatasetH(handler, {"train": ("2024-01-02", "2024-01-15")})


@pytest.mark.parametrize("loader_freq", [None, "30min"])
def test_ready_weights_use_the_bars_of_the_dataset(loader_freq: str | None) -> None:
    dataset = intraday_dataset(loader_freq)
    data = dataset.prepare("train", col_set=["label"])
    for weight in (LiquidityWeight(window=3), VolatilityWeight(window=3)):
        weight.bind(dataset)
        assert len(validate_weights(weight.reweight(data), data.index)) == 160
    # By hand: the mean amount of three bars by that of the bar's median instrument.
    bars = dataset.handler.source.load().to_frame()
    amount = (bars["close"] * bars["volume"]).unstack().rolling(3, min_periods=1).mean()
    expected = amount.div(amount.median(axis=1), axis=0).stack() ** 0.5
    weight = LiquidityWeight(window=3)
    weight.bind(dataset)
    np.testing.assert_allclose(weight.reweight(data), expected.reindex(data.index), rtol=1e-5)


def test_time_decay_counts_days_of_several_bars_once() -> None:
    data = intraday_dataset().prepare("train", col_set=["label"])
    weight = TimeDecay(half_life=2).reweight(data).groupby(level="datetime").first()
    assert weight.tolist() == [0.5 ** ((9 - k // 4) / 2) for k in range(40)]
