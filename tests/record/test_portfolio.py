"""Portfolio records: artifacts, metrics and errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch.backtest import Exchange, TopkDropoutStrategy, backtest
from qtorch.core.errors import ConfigError, RecordError
from qtorch.data import DataHandlerLP, DatasetH, FrameSource, QlibDataLoader, SyntheticSource
from qtorch.metrics import risk_analysis
from qtorch.record import HFSignalRecord, MultiPassPortAnaRecord, PortAnaRecord, SigAnaRecord

COSTS = {"open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5}
BACKTEST = {"account": 1e7, "benchmark": "MARKET", "exchange_kwargs": COSTS}


@pytest.fixture(scope="module")
def market():
    return SyntheticSource(30, "2019-01-01", "2019-12-31", seed=1)


@pytest.fixture(scope="module")
def scores(market):
    names = sorted(market.instruments("stocks"))
    index = pd.MultiIndex.from_product(
        [market.calendar("2019-03-01", "2019-11-29"), names], names=["datetime", "instrument"]
    )
    return pd.Series(np.random.default_rng(0).standard_normal(len(index)), index, name="score")


class Dataset:
    """The part of a dataset that records read: its source of bars."""

    def __init__(self, source):
        self.handler = DataHandlerLP("all", data_loader=QlibDataLoader(["$close"]), source=source)


@pytest.fixture
def run(recorder, scores, market):
    recorder.save_objects(**{"pred.pkl": scores.to_frame()})
    return recorder, Dataset(market)


@pytest.fixture
def days_of_two():
    """Six days of A, whose bars end, and of B."""
    days = pd.bdate_range("2020-01-01", periods=6, name="datetime")
    index = pd.MultiIndex.from_product([days, ["A", "B"]], names=["datetime", "instrument"])
    frame = pd.DataFrame({"close": 10.0, "factor": 1.0}, index=index)
    has_bar = (index.get_level_values(1) == "B") | (index.get_level_values(0) < days[3])
    scores = pd.Series([2.0, 1.0] * 6, index=index)[has_bar]
    return SimpleNamespace(scores=scores, source=FrameSource(frame[has_bar]))


def config(signal="<PRED>", **settings):
    strategy = {"class": "TopkDropoutStrategy", "module_path": "qlib.contrib.strategy"}
    strategy["kwargs"] = {"signal": signal, "topk": 8, "n_drop": 2}
    return {"strategy": strategy, "backtest": {**BACKTEST, **settings}}


@pytest.mark.slow
def test_record_stores_the_backtest_and_logs_its_risk(run, scores, market):
    recorder, dataset = run
    PortAnaRecord(recorder, config(), dataset=dataset).generate()
    strategy = TopkDropoutStrategy(signal=scores, topk=8, n_drop=2)
    start = scores.index[0][0]
    expected_result = backtest(start, None, strategy, source=market, **BACKTEST)
    report = recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
    pd.testing.assert_frame_equal(report, expected_result.report, check_freq=False)
    positions = recorder.load_object("portfolio_analysis/positions_normal_1day.pkl")
    pd.testing.assert_frame_equal(positions.frame, expected_result.positions)
    assert list(positions) == list(expected_result.dates)
    last, expected_last = (
        list(positions.values())[-1],
        list(expected_result.positions_normal.values())[-1],
    )
    assert last.position == expected_last.position
    indicators = recorder.load_object("portfolio_analysis/indicators_normal_1day.pkl")
    np.testing.assert_allclose(indicators, expected_result.indicators)
    excess_return = expected_result.report["return"] - expected_result.report["bench"]
    metrics = recorder.list_metrics()
    for name, series in (
        ("without", excess_return),
        ("with", excess_return - expected_result.report["cost"]),
    ):
        risk = risk_analysis(series, freq="day")["risk"]
        for figure, value in risk.items():
            logged_value = metrics[f"1day.excess_return_{name}_cost.{figure}"]
            assert logged_value == pytest.approx(value, rel=1e-9)
    analysis = recorder.load_object("portfolio_analysis/port_analysis_1day.pkl")
    assert list(analysis.index.get_level_values(0).unique()) == [
        "excess_return_without_cost",
        "excess_return_with_cost",
    ]
    assert 0.9 < metrics["1day.ffr"] <= 1
    assert metrics["1day.pa"] == metrics["1day.pos"] == 0


@pytest.mark.slow
def test_forms_of_strategy_and_source(run, market):
    recorder, dataset = run
    first_objects = PortAnaRecord(recorder, config(), dataset=dataset).generate()
    strategy = {"_target_": "qtorch.backtest.TopkDropoutStrategy", "topk": 8, "n_drop": 2}
    hydra_config = {"strategy": {**strategy, "signal": "<PRED>"}, "backtest": BACKTEST}
    live_strategy = {"strategy": TopkDropoutStrategy(signal="<PRED>", topk=8, n_drop=2)}
    exchange = {**BACKTEST, "exchange_kwargs": {**COSTS, "source": market}}
    name = "report_normal_1day.pkl"
    for record in (
        PortAnaRecord(recorder, hydra_config, dataset=dataset),
        PortAnaRecord(recorder, {**live_strategy, "backtest": exchange}),
    ):
        pd.testing.assert_frame_equal(record.generate()[name], first_objects[name])
    with pytest.raises(ConfigError, match="no data source"):
        PortAnaRecord(recorder, config()).generate()


def test_coarser_frequencies_aggregate_daily_results(run):
    recorder, dataset = run
    freqs = ["day", "week", "month"]
    objects = PortAnaRecord(
        recorder,
        config(),
        risk_analysis_freq=freqs,
        indicator_analysis_freq=freqs,
        dataset=dataset,
    ).generate()
    day, week = objects["report_normal_1day.pkl"], objects["report_normal_1week.pkl"]
    by_week = day.groupby(day.index.to_period("W"))
    assert len(week) == by_week.ngroups
    assert week["account"].tolist() == by_week["account"].last().tolist()
    growth = (1 + week["return"] - week["cost"]).prod()
    assert growth == pytest.approx((1 + day["return"] - day["cost"]).prod())
    np.testing.assert_allclose(
        week["bench"], (1 + by_week["bench"].apply(lambda b: (1 + b).prod() - 1)) - 1
    )
    previous_account = week["account"].shift(1).iloc[1:]
    cost = by_week["total_cost"].last().diff().to_numpy()[1:]
    np.testing.assert_allclose(week["cost"].iloc[1:], cost / previous_account)
    metrics = recorder.list_metrics()
    assert metrics["1month.excess_return_with_cost.mean"] != 0
    trades = objects["indicators_normal_1month.pkl"]
    assert trades["count"].sum() == objects["indicators_normal_1day.pkl"]["count"].sum()
    assert metrics["1week.ffr"] == pytest.approx(metrics["1day.ffr"])


@pytest.mark.slow
def test_scored_benchmark_and_no_benchmark(run, market, scores):
    recorder, dataset = run
    settings = config()
    del settings["backtest"]["benchmark"]
    objects = PortAnaRecord(recorder, settings, dataset=dataset).generate()
    bench = objects["report_normal_1day.pkl"]["bench"]
    names = sorted(set(scores.index.get_level_values(1)))
    close = market.features(names, ["$close"], None, bench.index[-1]).iloc[:, 0].unstack(0)
    returns = (close / close.ffill().shift(1) - 1).loc[bench.index[0] :]
    np.testing.assert_allclose(bench, returns.mean(axis=1), atol=1e-7)
    objects = PortAnaRecord(recorder, config(benchmark=None), dataset=dataset).generate()
    assert objects["report_normal_1day.pkl"]["bench"].isna().all()
    assert "1day.return_with_cost.annualized_return" in recorder.list_metrics()


def test_errors_and_skip_existing(recorder, scores, market):
    with pytest.raises(RecordError, match=r"PortAnaRecord needs pred\.pkl"):
        PortAnaRecord(recorder, config()).generate()
    with pytest.raises(ConfigError, match="part of the config"):
        PortAnaRecord(recorder, {"strategi": {}})
    with pytest.raises(ConfigError, match="frequency"):
        PortAnaRecord(recorder, config(), risk_analysis_freq="fortnight")
    recorder.save_objects(**{"pred.pkl": scores.to_frame()})
    qtorch.init(trusted=[])
    assert PortAnaRecord(recorder, config(), dataset=Dataset(market)).generate() is not None
    second_record = PortAnaRecord(recorder, config(), skip_existing=True, dataset=Dataset(market))
    assert second_record.generate() is None


def test_a_fault_of_the_audit_is_loud_and_all_is_stored(run, market, caplog):
    recorder, dataset = run
    wrong = config(start_time="2019-11-20")
    wrong["backtest"]["exchange_kwargs"] = {**COSTS, "deal_price": "1.5*$close"}
    with pytest.raises(RecordError, match=r"outside the low and the high(.|\n)*All is stored"):
        PortAnaRecord(recorder, wrong, dataset=dataset).generate()
    assert "1day.ffr" in recorder.list_metrics()
    assert len(recorder.load_object("portfolio_analysis/orders_normal_1day.pkl"))
    PortAnaRecord(recorder, wrong, dataset=dataset, audit="warning").generate()
    assert "the audit of the backtest failed" in caplog.text
    caplog.clear()
    PortAnaRecord(recorder, wrong, dataset=dataset, audit="off").generate()
    assert "audit" not in caplog.text
    with pytest.raises(ConfigError, match="audit"):
        PortAnaRecord(recorder, wrong, audit="loud")


def test_as_qlib_holds_for_the_backtest_and_its_risk(run, market, scores):
    recorder, dataset = run
    settings = config(start_time="2019-11-01", as_qlib=True)
    objects = PortAnaRecord(recorder, settings, dataset=dataset).generate()
    strategy = TopkDropoutStrategy(signal=scores, topk=8, n_drop=2)
    dates = {"start_time": "2019-11-01", "strategy": strategy, "source": market}
    report = backtest(**dates, **BACKTEST, as_qlib=True).report
    pd.testing.assert_frame_equal(objects["report_normal_1day.pkl"], report, check_freq=False)
    excess_return = report["return"] - report["bench"]
    risk = risk_analysis(excess_return, freq="day", as_qlib=True)["risk"]
    logged = recorder.list_metrics()["1day.excess_return_without_cost.max_drawdown"]
    assert logged == pytest.approx(risk["max_drawdown"])


def test_positions_whose_bars_end_are_stored_and_counted(recorder, days_of_two):
    recorder.save_objects(**{"pred.pkl": days_of_two.scores.to_frame("score")})
    settings = config()
    settings["strategy"]["kwargs"] |= {"topk": 1, "n_drop": 0}
    settings["backtest"] = {"account": 1e6, "exchange_kwargs": COSTS}
    record = PortAnaRecord(recorder, settings, dataset=Dataset(days_of_two.source))
    objects = record.generate()
    assert recorder.list_metrics()["1day.ended_positions"] == 1
    frame = recorder.load_object("portfolio_analysis/delistings_normal_1day.pkl")
    assert frame.index.get_level_values("instrument").tolist() == ["A"]
    assert objects["report_normal_1day.pkl"]["value"].iloc[-1] > 0  # in B


@pytest.mark.slow
def test_passes_differ_only_in_the_first_portfolio(run):
    recorder, dataset = run
    record = MultiPassPortAnaRecord(recorder, pass_num=4, config=config(), dataset=dataset)
    statistics = record.generate()["multi_pass_port_analysis_1day.pkl"]
    assert list(statistics.columns) == ["mean", "std", "mean_std"]
    assert set(statistics.index.get_level_values(1)) == {"annualized_return", "information_ratio"}
    assert (statistics["std"] > 0).all()
    metrics = recorder.list_metrics()
    row = ("excess_return_with_cost", "annualized_return")
    assert metrics["mean.excess_return_with_cost.annualized_return"] == pytest.approx(
        statistics.loc[row, "mean"]
    )
    assert "std.excess_return_without_cost.information_ratio" in metrics
    equal_passes = MultiPassPortAnaRecord(
        recorder, pass_num=3, shuffle_init_score=False, config=config(), dataset=dataset
    ).generate()["multi_pass_port_analysis_1day.pkl"]
    np.testing.assert_allclose(equal_passes["std"], 0, atol=1e-12)
    single_backtest = PortAnaRecord(recorder, config(), dataset=dataset).generate()
    risk = single_backtest["port_analysis_1day.pkl"]["risk"]
    assert equal_passes.loc[row, "mean"] == pytest.approx(risk[row])
    with pytest.raises(ConfigError, match="signal: <PRED>"):
        MultiPassPortAnaRecord(recorder, config=config(signal="other"))


def test_precision_of_intraday_scores(recorder):
    times = pd.date_range("2020-01-02 09:31", periods=4, freq="min")
    index = pd.MultiIndex.from_product(
        [times, [f"I{k}" for k in range(10)]], names=["datetime", "instrument"]
    )
    label = pd.Series(np.tile(np.arange(10) - 4.5, 4), index=index)
    score = label.copy()
    score.loc[times[0]] = -label.loc[times[0]].to_numpy()  # all scores of the first bar are wrong
    recorder.save_objects(
        **{"pred.pkl": score.to_frame("score"), "label.pkl": label.to_frame("LABEL0")}
    )
    objects = HFSignalRecord(recorder).generate()
    assert objects["long_pre.pkl"].tolist() == [0, 1, 1, 1]
    assert objects["short_pre.pkl"].tolist() == [0, 1, 1, 1]
    metrics = recorder.list_metrics()
    assert metrics["Long precision"] == metrics["Short precision"] == 0.75
    assert metrics["IC"] == pytest.approx(0.5)
    assert metrics["Long-Short Average Return"] == pytest.approx((3 - 1) * 4 / 4)
    stored_returns = recorder.load_object("hg_sig_analysis/long_short_r.pkl")
    np.testing.assert_allclose(stored_returns, [-4, 4, 4, 4])


# -- bars within a day, regions --------------------------------------------------------------------


def intraday_run(recorder, *, has_own_source=False) -> DatasetH:
    """Store scores of half-hours, four a day, and return their dataset.

    The source of its bars is that of the handler, or the loader's own.
    """
    days = pd.bdate_range("2024-01-02", periods=12)
    stamps = [d + pd.Timedelta(minutes=m) for d in days for m in (600, 630, 660, 690)]
    names = list("ABCDEFGHIJ")
    index = pd.MultiIndex.from_product([stamps, names], names=["datetime", "instrument"])
    close = 10 * np.exp(np.random.default_rng(0).normal(0, 0.01, (48, 10)).cumsum(0)).ravel()
    bars = pd.DataFrame({"close": close, "volume": 1e5}, index)
    fields = {"feature": ["$close"], "label": ["Ref($close, -1)/$close-1"]}
    source = FrameSource(bars)
    own_source, other_source = (source, None) if has_own_source else (None, source)
    loader = QlibDataLoader(fields, source=own_source)
    handler = DataHandlerLP("all", data_loader=loader, source=other_source)
    score = (-bars[["close"]]).rename(columns={"close": "score"}).iloc[:400]
    label = bars[["close"]].groupby(level=1).pct_change().fillna(0.0).iloc[:400]
    recorder.save_objects(**{"pred.pkl": score, "label.pkl": label})
    return DatasetH(handler, {"test": ("2024-01-02", "2024-01-17")})


@pytest.mark.parametrize("has_own_source", [False, True])
def test_records_have_the_frequency_of_the_dataset(recorder, has_own_source):
    dataset = intraday_run(recorder, has_own_source=has_own_source)
    strategy = {"class": "TopkDropoutStrategy", "kwargs": {"signal": "<PRED>", "topk": 2}}
    strategy["kwargs"]["n_drop"] = 1
    record = PortAnaRecord(recorder, {"strategy": strategy}, dataset=dataset)
    objects = record.generate()
    assert record.list()[0] == "report_normal_30min.pkl"
    report = objects["report_normal_30min.pkl"]
    assert len(report) == 41  # the first bar of the scores to the bar after the last
    metrics = recorder.list_metrics()
    assert metrics["30min.periods_per_year"] == 4 * 252
    excess = report["return"] - report["bench"]
    name = "30min.excess_return_without_cost.annualized_return"
    assert metrics[name] == pytest.approx(excess.mean() * 4 * 252)
    SigAnaRecord(recorder, ana_long_short=True).generate()
    long_short = recorder.load_object("sig_analysis/long_short_r.pkl")
    metrics = recorder.list_metrics()
    assert metrics["Long-Short Ann Return"] == pytest.approx(long_short.mean() * 4 * 252)


def test_the_region_of_a_record_sets_limit_lots_and_annual_figures(recorder, scores, market):
    recorder.save_objects(**{"pred.pkl": scores.iloc[:300].to_frame()})
    settings = config(exchange_kwargs=None)
    record = PortAnaRecord(recorder, settings, dataset=Dataset(market), region="tw")
    objects = record.generate()
    metrics = recorder.list_metrics()
    assert metrics["1day.periods_per_year"] == 238
    shares = objects["orders_normal_1day.pkl"]["deal_amount"]
    report = objects["report_normal_1day.pkl"]
    excess = report["return"] - report["bench"] - report["cost"]
    annual = metrics["1day.excess_return_with_cost.annualized_return"]
    assert annual == pytest.approx(excess.mean() * 238)
    exchange = Exchange(source=market, region="tw")
    assert (exchange.trade_unit, exchange.limit_threshold) == (1000, 0.1)
    assert len(shares)
