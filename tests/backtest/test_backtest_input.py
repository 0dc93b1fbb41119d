"""Invalid input: each case raises one clear error or is handled as documented."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from small_market import bars, score_table

import qtorch
from qtorch.backtest import (
    Exchange,
    LongShortStrategy,
    TopkDropoutStrategy,
    WeightStrategy,
    backtest,
)
from qtorch.backtest.scores import Scores
from qtorch.core.errors import ArgumentError, ConfigError, DataError


@pytest.fixture
def source():
    return bars({"A": [10, 11, 12, 13, 14], "B": [10, 9, 8, 7, 6], "C": [5, 5, 5, 5, 5]})


@pytest.fixture
def scores(days):
    return score_table({"A": [3, 1, 1, 2], "B": [2, 3, 3, 1], "C": [1, 2, 2, 3]}, days)


def run(scores, source, **kwargs):
    defaults = {"account": 1e4, "source": source, "exchange_kwargs": {"trade_unit": None}}
    return backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1), **defaults | kwargs
    )


def test_unknown_instruments_are_suspended_with_a_warning(scores, source, days, caplog):
    unknown_scores = score_table({"X": [9, 9, 9, 9]}, days)
    with caplog.at_level("WARNING"):
        result = run(pd.concat([scores, unknown_scores]), source)
    assert "1 of 4 instruments of the scores have no bars" in caplog.text
    assert "X" in caplog.text
    assert (result.orders.index.get_level_values(1) != "X").all()
    with pytest.raises(DataError, match=r"none of the 1 instruments.*'X'"):
        run(unknown_scores, source)


def test_scores_outside_the_calendar_warn_or_fail(scores, source, caplog):
    weekend = pd.Series(
        [5.0],
        index=pd.MultiIndex.from_tuples(
            [(pd.Timestamp("2020-01-04"), "C")], names=["datetime", "instrument"]
        ),
    )
    with caplog.at_level("WARNING"):
        result = run(pd.concat([scores, weekend.rename("score")]), source)
    assert "ignoring scores of 1 dates that are not trading days" in caplog.text
    assert result.report.equals(run(scores, source).report)
    future_scores = scores.copy()
    future_scores.index = future_scores.index.set_levels(
        future_scores.index.levels[0] + pd.Timedelta(days=900), level=0
    )
    with pytest.raises(DataError, match=r"2022.*the calendar goes from 2020-01-01"):
        run(future_scores, source)


def test_the_latest_score_of_a_bar_counts_whatever_the_order_of_the_dates():
    monday, wednesday, friday = pd.to_datetime(["2020-01-06", "2020-01-08", "2020-01-10"])
    parts = {friday: [np.nan, 5.0], wednesday: [2.0, 4.0], monday: [1.0, 3.0]}
    frames = {day: pd.DataFrame({"score": values}, ["A", "B"]) for day, values in parts.items()}
    scores = pd.concat(frames)
    assert not scores.index.levels[0].is_monotonic_increasing
    weeks = pd.DatetimeIndex([monday, monday + pd.Timedelta(days=7)])
    bar_scores = Scores(scores, weeks, "week").align(pd.Index(["A", "B"]))
    np.testing.assert_array_equal(bar_scores.read(0), [[2.0, 5.0]])
    assert bar_scores.read(1) is None


def test_infinite_duplicate_and_empty_scores_are_rejected(scores, source):
    with pytest.raises(DataError, match="1 scores are infinite, the first at 2020-01-01"):
        run(scores.where(scores.index != scores.index[0], np.inf), source)
    with pytest.raises(DataError, match="3 rows of the scores are duplicates"):
        run(pd.concat([scores, scores.iloc[:3]]), source)
    with pytest.raises(DataError, match="every score is NaN"):
        run(scores * np.nan, source)
    with pytest.raises(DataError, match="index with two levels"):
        run(scores.droplevel(0), source)
    with pytest.raises(ConfigError, match="signal is list"):
        run([1, 2, 3], source)


def test_no_orders_after_a_day_of_nan_scores(scores, source, days):
    gap_scores = scores.copy()
    gap_scores.loc[days[1]] = np.nan
    orders = run(gap_scores, source).orders
    assert days[2] not in orders.index.get_level_values(0)
    assert days[3] in orders.index.get_level_values(0)


def test_instruments_without_a_score_are_not_bought(scores, source, days):
    partial_scores = scores.where(scores.index.get_level_values(1) != "A")
    orders = run(partial_scores, source).orders
    assert "A" not in orders.index.get_level_values(1)


def test_unknown_benchmark_is_rejected(scores, source):
    with pytest.raises(DataError, match=r"benchmark.*'SH000300'"):
        run(scores, source, benchmark="SH000300")
    with pytest.raises(DataError, match=r"instrument of the benchmark.*'D'"):
        run(scores, source, benchmark=["A", "D"])
    old = pd.Series([0.1], index=pd.to_datetime(["1999-01-01"]))
    with pytest.raises(DataError, match="cover none of 2020-01-02"):
        run(scores, source, benchmark=old)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        ({"open_cost": -0.1}, "open_cost=-0.1: expected zero or more"),
        ({"min_cost": -5}, "an amount of money"),
        ({"close_cost": 1}, "fraction of the trade's value"),
        ({"start_time": "2020-01-03"}, "start_time and end_time allow 2020-01-03"),
        ({"end_time": "2020-01-03"}, "the backtest goes from 2020-01-02"),
        ({"trade_unit": -100}, "trade_unit=-100"),
        ({"limit_threshold": -0.1}, "limit_threshold=-0.1"),
        ({"deal_price": ("open",)}, "deal_price="),
        ({"volume_threshold": ("most", "$volume")}, "'cum' or 'current'"),
        ({"volume_threshold": {"both": ("cum", "$volume")}}, "side of volume_threshold"),
        ({"deal_price": "clos"}, r"\$?clos.*close"),
        ({"freq": "day", "opn_cost": 1}, "open_cost"),
    ],
)
def test_invalid_exchange_arguments_are_rejected(scores, source, exchange, message):
    error = DataError if exchange == {"deal_price": "clos"} else ConfigError
    with pytest.raises(error, match=message):
        run(scores, source, exchange_kwargs=exchange)


def test_exchange_bounds_that_contain_the_backtest_change_nothing(scores, source):
    bounds = {"start_time": "2020-01-02", "end_time": "2020-01-07"}
    result = run(scores, source, exchange_kwargs={"trade_unit": None, **bounds})
    assert result.report.equals(run(scores, source).report)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"topk": 4, "n_drop": 1}, "topk=4 is more than the 3 instruments"),
        ({"topk": 0, "n_drop": 0}, "topk=0"),
        ({"topk": 1, "n_drop": -1}, "n_drop=-1"),
        ({"topk": 1, "n_drop": 1, "method_buy": "best"}, "method_buy"),
        ({"topk": 1, "n_drop": 1, "risk_degree": 1.5}, "risk_degree=1.5"),
    ],
)
def test_invalid_strategy_arguments_are_rejected(scores, source, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        backtest(strategy=TopkDropoutStrategy(signal=scores, **kwargs), account=1e4, source=source)


def test_missing_signal_and_unknown_arguments_are_rejected(scores):
    with pytest.raises(ConfigError, match="<PRED>"):
        TopkDropoutStrategy(topk=1, n_drop=1)
    with pytest.raises(ArgumentError, match="topk"):
        TopkDropoutStrategy(topkk=1, n_drop=1, signal=scores)
    with pytest.raises(ConfigError, match=r"quantile=0\.9"):
        LongShortStrategy(signal=scores, quantile=0.9)


def test_invalid_dates_accounts_and_executors_are_rejected(scores, source):
    with pytest.raises(ConfigError, match="start_time 2020-01-05 is after end_time 2020-01-02"):
        run(scores, source, start_time="2020-01-05", end_time="2020-01-02")
    with pytest.raises(DataError, match="the backtest has no bar between"):
        run(scores, source, start_time="2021-01-05", end_time="2021-01-12")
    with pytest.raises(ConfigError, match="expected an amount of money"):
        run(scores, source, account=-1)
    with pytest.raises(ConfigError, match="neither cash nor positions"):
        run(scores, source, account=0)
    with pytest.raises(ConfigError, match=r"instrument of the account.*'Z'"):
        run(scores, source, account={"cash": 1, "Z": 5})
    with pytest.raises(ConfigError, match=r"NestedExecutor.*not supported"):
        run(scores, source, executor={"class": "NestedExecutor", "kwargs": {}})
    with pytest.raises(ConfigError, match="trade_type"):
        run(scores, source, executor={"kwargs": {"trade_type": "random"}})
    with pytest.raises(ConfigError, match="no data source"):
        run(scores, None)


@pytest.mark.parametrize("position", [{"price": 3}, {"amount": None}, "many", float("nan")])
def test_initial_position_without_an_amount_is_rejected(scores, source, position):
    with pytest.raises(ConfigError, match="expected a number as its amount"):
        run(scores, source, account={"cash": 1, "A": position})


def test_cash_may_be_a_number_of_numpy(scores, source):
    expected = run(scores, source, account=10_000).report
    for cash in (np.int64(10_000), np.float32(10_000)):
        assert run(scores, source, account=cash).report.equals(expected)


@pytest.mark.parametrize("kwargs", [{}, None, {"time_per_step": "1d"}])
def test_executor_with_default_settings_changes_nothing(scores, source, kwargs):
    executor = {"class": "SimulatorExecutor", "kwargs": kwargs}
    assert run(scores, source, executor=executor).report.equals(run(scores, source).report)


@pytest.mark.parametrize("is_built", [True, False])
def test_executor_and_exchange_of_different_frequency_are_rejected(scores, source, is_built):
    executor = {"class": "SimulatorExecutor", "kwargs": {"time_per_step": "30min"}}
    options = {"freq": "day"}
    if is_built:
        options = {"exchange": Exchange(source=source, trade_unit=None)}
    with pytest.raises(ConfigError, match="time_per_step is '30min', but the exchange's bars"):
        run(
            scores,
            None if is_built else source,
            executor=executor,
            exchange_kwargs=options,
        )


def test_invalid_target_weights_are_rejected(source, days):
    table = pd.DataFrame({"A": [0.8, 0.5], "B": [0.4, 0.5]}, index=days[:2])
    with pytest.raises(DataError, match=r"sum to 1\.2"):
        backtest(strategy=WeightStrategy(signal=table), account=1e4, source=source)
    with pytest.raises(DataError, match=r"weight is -0\.8"):
        backtest(strategy=WeightStrategy(signal=-table), account=1e4, source=source)


def test_region_defaults_and_a_prebuilt_exchange(scores, source, caplog):
    qtorch.init(region="cn")
    exchange = Exchange(source=source)
    assert (exchange.trade_unit, exchange.limit_threshold) == (100, 0.095)
    assert Exchange(source=source, limit_threshold="none").limit_threshold is None
    result = run(scores, None, exchange_kwargs={"exchange": exchange})
    assert (result.orders["deal_amount"] % 100 == 0).all()
    wrong_config = {"class": "WeightStrategy", "kwargs": {}}
    with pytest.raises(ConfigError, match="exchange is WeightStrategy; expected an Exchange"):
        run(scores, None, exchange_kwargs={"exchange": wrong_config})
    with pytest.raises(ConfigError, match="must be arguments of it"):
        run(scores, None, exchange_kwargs={"exchange": exchange, "min_cost": 1})


def test_missing_factor_disables_rounding_with_a_warning(scores, caplog):
    nan = np.nan
    source = bars({"A": [10] * 5, "B": [10] * 5, "C": [5] * 5}, factor={"A": [nan] * 5})
    with caplog.at_level("WARNING"):
        result = run(scores, source, exchange_kwargs={"trade_unit": 100})
    assert "on some days" in caplog.text
    assert "the backtest trades fractions of lots of 100 shares" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        run(scores, source, exchange_kwargs={"trade_unit": 1})
    (level,) = [r.levelname for r in caplog.records if "fractions of shares" in r.message]
    assert level == "INFO"
    assert (result.orders["deal_amount"] % 100 != 0).any()


def test_strategy_configurations_and_model_signals(scores, source):
    class FakeModel:
        def predict(self, dataset, segment="test"):
            return scores

    config = {"class": "TopkDropoutStrategy", "kwargs": {"topk": 1, "n_drop": 1}}
    config["kwargs"]["signal"] = (FakeModel(), None)
    result = backtest(strategy=config, account=1e4, source=source)
    hydra = {"_target_": "qtorch.backtest.TopkDropoutStrategy", "topk": 1, "n_drop": 1}
    hydra_result = backtest(
        strategy={**hydra, "signal": scores.to_frame()}, account=1e4, source=source
    )
    assert result.report.equals(hydra_result.report)
    with pytest.raises(ConfigError, match="strategy is NoneType"):
        backtest(strategy=None, account=1e4, source=source)
