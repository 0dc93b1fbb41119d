"""Where Qlib is wrong about money: the right value by hand, and Qlib's with `as_qlib`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from small_market import bars, score_table

from qtorch.backtest import LongShortStrategy, TopkDropoutStrategy, WeightStrategy, backtest
from qtorch.backtest.run import benchmark_returns
from qtorch.core.errors import ConfigError
from qtorch.data.source.frame import FrameSource

FREE = {"open_cost": 0.0, "close_cost": 0.0, "min_cost": 0.0, "trade_unit": None}
NAN = np.nan


def run(strategy, source, *, start=None, end=None, account=1_000.0, **kwargs):
    exchange = {**FREE, **kwargs.pop("exchange", {})}
    return backtest(
        start, end, strategy, account=account, source=source, exchange_kwargs=exchange, **kwargs
    )


def topk(scores, **kwargs):
    return TopkDropoutStrategy(signal=scores, **{"topk": 1, "n_drop": 1, **kwargs})


def position_names(result):
    """The instruments held on each day, as one text per day."""
    frame = result.positions.reset_index()
    return frame.groupby("datetime")["instrument"].apply("".join).tolist()


# -- never more than topk positions ------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kwargs"),
    [
        ({}, {"hold_thresh": 3}),
        ({"exchange": {"limit_threshold": ("0*$close", "$close<9.5")}}, {}),
        ({"exchange": {"volume_threshold": {"sell": ("cum", "0*$close+1")}}}, {}),
    ],
    ids=["held too short", "at the lower limit", "no volume to sell into"],
)
def test_a_sale_that_is_not_made_frees_no_slot(days, source, kwargs):
    market = bars({"A": [10, 10, 9, 9, 9], "B": [10] * 5})
    scores = score_table({"A": [2, 1, 1], "B": [1, 2, 2]}, days)
    # A is bought on the second day. On the third it should be replaced by B but cannot be sold.
    right = run(topk(scores, **kwargs), market, end=days[2], **source)
    assert position_names(right) == ["A", "A"]
    qlib = run(topk(scores, **kwargs), market, end=days[2], as_qlib=True, **source)
    assert position_names(qlib) == ["A", "AB"]


def test_a_suspended_holding_keeps_its_slot(days):
    market = bars({"A": [10, 10, NAN, 10, 10], "B": [10] * 5})
    scores = score_table({"A": [2, 1, 1, 1], "B": [1, 2, 2, 2]}, days)
    assert position_names(run(topk(scores), market)) == ["A", "A", "B", "B"]
    assert position_names(run(topk(scores), market, as_qlib=True)) == ["A", "AB", "B", "B"]


@pytest.mark.parametrize("method", [{}, {"method_sell": "random", "method_buy": "random"}])
def test_topk_is_a_bound_for_every_member(synthetic_market, random_scores, method):
    scores = pd.DataFrame({"a": random_scores, "b": -random_scores})
    exchange = {"limit_threshold": 0.01, "volume_threshold": ("cum", "0.001*$volume")}
    strategy = TopkDropoutStrategy(signal=scores, topk=5, n_drop=3, hold_thresh=3, **method)
    result = run(strategy, synthetic_market, account=1e6, exchange=exchange)
    counts = result.positions.groupby(level=[0, 1]).size()
    assert counts.max() == 5
    result.check()


# -- get_risk_degree ---------------------------------------------------------------------------


class MarketTimer(TopkDropoutStrategy):
    degrees = (0.5, 0.0, 1.0)

    def get_risk_degree(self, trade_step=None):
        return self.degrees[trade_step]


class WeightTimer(WeightStrategy):
    def get_risk_degree(self, trade_step=None):
        return (0.5, 0.25, 0.0)[trade_step]


def test_the_risk_degree_of_a_subclass_is_asked_at_each_bar(days):
    source = bars({"A": [10] * 4, "B": [10] * 4, "C": [10] * 4})
    scores = score_table({"A": [3, 1, 1], "B": [2, 3, 1], "C": [1, 2, 3]}, days)
    strategy = MarketTimer(signal=scores, topk=1, n_drop=1, risk_degree=0.8)
    # 50% of 1000 in A; all sold and nothing bought; all of it in C.
    assert run(strategy, source).report["value"].tolist() == [500, 0, 1_000]
    # Qlib's TopkDropoutStrategy reads the attribute.
    assert run(strategy, source, as_qlib=True).report["value"].iloc[0] == 800
    table = pd.DataFrame({"A": [1.0] * 3}, index=days[:3])
    timer = WeightTimer(signal=table)
    assert run(timer, source).report["value"].tolist() == [500, 250, 0]
    assert run(timer, source, as_qlib=True).report["value"].tolist() == [500, 250, 0]


@pytest.mark.parametrize("degree", [1.5, -0.1, NAN, None])
def test_a_risk_degree_that_is_no_fraction_is_rejected(days, degree):
    strategy = MarketTimer(signal=score_table({"A": [1, 1]}, days), topk=1, n_drop=1)
    strategy.degrees = (degree, degree)
    with pytest.raises(ConfigError, match=r"MarketTimer.get_risk_degree\(0\) is .*from 0 to 1"):
        run(strategy, bars({"A": [10] * 4}))


# -- the price limit ---------------------------------------------------------------------------


def first_purchase(source, days, deal_price, **kwargs):
    """The day and the price of the first purchase of A, which is always the best."""
    scores = score_table({"A": [1] * 4}, days)
    exchange = {"limit_threshold": 0.095, "deal_price": deal_price}
    orders = run(topk(scores), source, exchange=exchange, **kwargs).orders
    dealt = orders[orders["deal_amount"] > 0]
    return dealt.index[0][0], dealt["price"].iloc[0]


def test_a_limit_is_judged_by_the_price_that_is_dealt(days):
    change = {"A": [0, 0.12, 0, 0, 0]}
    table = {"A": [10, 11.2, 11.2, 11.2, 11.2]}
    at_once = bars(table, open={"A": [10, 10, 11.2, 11.2, 11.2]}, change=change)
    # The open is an ordinary price; that the close is up 12% is not known yet.
    assert first_purchase(at_once, days, "open") == (days[1], 10)
    assert first_purchase(at_once, days, "open", as_qlib=True)[0] == days[2]
    assert first_purchase(at_once, days, "close")[0] == days[2]
    # The open is up 12%, and the close is not: no purchase at the open.
    back = bars({"A": [10] * 5}, open={"A": [10, 11.2, 10, 10, 10]}, change={"A": [0] * 5})
    assert first_purchase(back, days, "open") == (days[2], 10)
    assert first_purchase(back, days, "open", as_qlib=True) == (days[1], pytest.approx(11.2))


def test_buying_and_selling_prices_have_their_own_limit(days):
    source = bars({"A": [10] * 4, "B": [10] * 4}, low={"A": [10, 10, 8, 8], "B": [10] * 4})
    scores = score_table({"A": [2, 1, 1], "B": [1, 2, 2]}, days)
    exchange = {"limit_threshold": 0.15, "deal_price": ("close", "low")}
    # A falls to 8 on the third day: it is not sold at the low of that day, nor of the next.
    assert position_names(run(topk(scores), source, exchange=exchange)) == ["A", "A", "A"]


@pytest.mark.parametrize("field", ["change", "other"])
def test_a_limit_counts_the_move_over_a_gap(days, field):
    # Suspended on the second and the third day, then up 12%.
    source = bars({"A": [10, NAN, NAN, 11.2, 11.2]}, **{field: {"A": [0, NAN, NAN, 0.12, 0]}})
    assert first_purchase(source, days, "close")[0] == days[4]
    start = {"start": days[3]}  # the close before the gap is older than the bar before
    assert first_purchase(source, days, "close", **start)[0] == days[4]


def test_change_knows_of_a_split_that_raw_prices_do_not_show(days):
    # Two for one on the second day: the raw price halves, the change says +2%.
    source = bars(
        {"A": [10, 5.1, 5.1, 5.1, 5.1]},
        open={"A": [10, 5, 5.1, 5.1, 5.1]},
        change={"A": [0, 0.02, 0, 0, 0]},
    )
    assert first_purchase(source, days, "open") == (days[1], 5)


@pytest.mark.parametrize("with_change", [False, True])
def test_the_limit_of_bars_within_a_day_is_that_of_the_day(with_change):
    """The reference of all bars of a day is the last close of the day before, as on exchanges."""
    times = pd.DatetimeIndex(
        [f"2020-01-0{day} {hour:02}:00" for day in (2, 3) for hour in (10, 11, 13, 14)],
        name="datetime",
    )
    close = [10.0, 10.0, 10.4, 10.0, 10.6, NAN, 11.2, 10.8]
    frame = pd.DataFrame({"close": close, "volume": 1e6, "factor": 1.0}, index=times)
    if with_change:
        frame["change"] = frame["close"].dropna().pct_change()
    frame = pd.concat({"A": frame}, names=["instrument"]).swaplevel()
    source = FrameSource(frame, freq="60min")
    scores = pd.Series(1.0, index=frame.index, name="score")

    def purchase(first_score, **kwargs):
        exchange = {"limit_threshold": 0.1, "freq": "60min"}
        plan = scores[scores.index.get_level_values(0) >= times[first_score]]
        orders = run(topk(plan), source, exchange=exchange, **kwargs).orders
        dealt = orders[orders["deal_amount"] > 0]
        return dealt.index[0][0]

    assert purchase(3) == times[4]  # +6%
    # At 13:00 the bar is 5.7% above the one before, but 12% above the day before.
    assert purchase(5) == times[7]
    if with_change:
        assert purchase(5, as_qlib=True) == times[6]


def test_the_default_limit_is_that_of_the_region(days):
    from qtorch.backtest import Exchange
    from qtorch.core.session import session_context
    from qtorch.record.portfolio import DEFAULT_CONFIG

    assert "limit_threshold" not in DEFAULT_CONFIG["backtest"]["exchange_kwargs"]
    with session_context(region="us"):
        assert Exchange().limit_threshold is None
    with session_context(region="cn"):
        assert Exchange().limit_threshold == 0.095


# -- bars that end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delisting", "account", "names"),
    [
        ("last_close", [1_000, 1_200, 1_200, 1_200, 1_200], ["A", "A", "B", "B", "B"]),
        ("zero", [1_000, 1_200, 0, 0, 0], ["A", "A"]),
        ("keep", [1_000, 1_200, 1_200, 1_200, 1_200], ["A"] * 5),
    ],
)
def test_a_position_whose_bars_end(days, caplog, delisting, account, names):
    source = bars({"A": [10, 10, 12, NAN, NAN, NAN], "B": [5] * 6})
    scores = score_table({"A": [2, 2, NAN, NAN, NAN], "B": [1] * 5}, days)
    with caplog.at_level("WARNING"):
        result = run(topk(scores, n_drop=0, risk_degree=1.0), source, delisting=delisting)
    assert result.report["account"].tolist() == pytest.approx(account)
    assert position_names(result) == names
    assert f"A on {days[3]:%Y-%m-%d}" in caplog.text
    assert f"delisting={delisting}" in caplog.text
    price = {"zero": 0}.get(delisting, 12)
    assert result.delistings.index.tolist() == [(days[3], "A")]
    assert result.delistings.iloc[0].to_dict() == {
        "amount": 100,
        "price": price,
        "value": price * 100,
    }
    # It is no order: no cost and no turnover.
    orders = result.orders
    assert orders[orders["direction"] == "sell"].empty
    result.check()


def test_qlib_keeps_a_position_whose_bars_end(days):
    source = bars({"A": [10, 10, 12, NAN, NAN], "B": [5] * 5})
    scores = score_table({"A": [2, 2, NAN, NAN], "B": [1] * 4}, days)
    result = run(topk(scores, n_drop=0), source, as_qlib=True)
    assert position_names(result) == ["A"] * 4
    assert result.delistings.empty


def test_a_short_position_whose_bars_end_is_bought_back(days):
    source = bars({"A": [10] * 6, "B": [10, 10, 5, NAN, NAN, NAN]})
    scores = score_table({"A": [2] * 5, "B": [1] * 5}, days)
    strategy = LongShortStrategy(signal=scores, topk=1, rebalance=100, risk_degree=1.0)
    result = run(strategy, source)
    # 500 short in B at 10, which falls to 5: a gain of 250 that stays.
    assert result.report["account"].tolist() == [1_000, 1_250, 1_250, 1_250, 1_250]
    assert result.report["cash"].tolist() == [1_000, 1_000, 750, 750, 750]
    assert position_names(result)[2:] == ["A", "A", "A"]
    result.check()


def test_a_suspension_is_no_end(days):
    prices = {"A": [10, 10, 12, NAN, NAN, NAN, 12], "B": [5] * 7}
    scores = score_table({"A": [2] * 5, "B": [1] * 5}, days)
    # The backtest ends within the suspension; the bars go on after it.
    result = run(topk(scores), bars(prices), end=days[5])
    assert result.delistings.empty
    assert position_names(result)[-1] == "A"


def test_an_initial_position_whose_bars_ended_before_is_closed_at_once(days):
    source = bars({"A": [10, NAN, NAN, NAN], "B": [5] * 4})
    scores = score_table({"B": [1] * 3}, days)
    account = {"cash": 0.0, "A": {"amount": 50, "price": 10.0}}
    strategy = topk(scores, n_drop=0, risk_degree=1.0)
    result = run(strategy, source, account=account, start=days[2])
    assert result.report["account"].tolist() == [500, 500]
    assert position_names(result) == ["B", "B"]
    result.check()


# -- closes of 0, gaps of the benchmark --------------------------------------------------------


def test_a_close_of_zero_is_a_missing_bar(days, caplog):
    source = bars({"A": [10, 10, 0, 12, 12]}, open={"A": [10, 10, 10, 12, 12]})
    scores = score_table({"A": [1] * 4}, days)
    with caplog.at_level("WARNING"):
        result = run(topk(scores, risk_degree=1.0), source)
    assert result.report["account"].tolist() == pytest.approx([1_000, 1_000, 1_200, 1_200])
    assert "1 closes are zero or negative and count as missing bars: of A" in caplog.text
    result.check()
    with np.errstate(all="ignore"):
        qlib = run(topk(scores, risk_degree=1.0), source, as_qlib=True)
    assert qlib.report["account"].iloc[1] == 0


@pytest.mark.parametrize("gap", [NAN, 0.0])
def test_benchmarks_keep_the_move_over_a_gap(days, gap):
    source = bars({"A": [10, gap, 12, 12], "B": [10, 10, 10, 11]})
    for benchmark, right, qlib in (
        ("A", [0, 0, 0.2, 0], [0, 0, 0, 0]),
        (["A", "B"], [0, 0, 0.1, 0.05], [0, 0, 0, 0.05]),
        ("all", [0, 0, 0.1, 0.05], [0, 0, 0, 0.05]),
    ):
        returns = benchmark_returns(benchmark, source, days[:4], "day")
        assert returns.tolist() == pytest.approx(right, abs=1e-7)
        # The gap is before the first day.
        later = benchmark_returns(benchmark, source, days[2:4], "day")
        assert later.tolist() == pytest.approx(right[2:], abs=1e-7)
        if np.isnan(gap):
            returns = benchmark_returns(benchmark, source, days[:4], "day", as_qlib=True)
            assert returns.tolist() == pytest.approx(qlib, abs=1e-7)


# -- short sales, initial portfolios -----------------------------------------------------------


def test_short_positions_pay_a_lending_fee_for_each_calendar_day(days):
    source = bars({"A": [10] * 5, "B": [10, 10, 20, 20, 20]})
    scores = score_table({"A": [2] * 4, "B": [1] * 4}, days)
    strategy = LongShortStrategy(signal=scores, topk=1, rebalance=100, risk_degree=1.0)
    result = run(strategy, source, exchange={"lending_fee": 0.365})
    # 50 shares short: worth 500 over Thursday night, 1000 over the weekend and Monday night.
    fees = [0, 500 * 0.001, 1_000 * 0.003, 1_000 * 0.001]
    assert result.lending_fees.tolist() == pytest.approx(fees)
    assert result.report["total_cost"].tolist() == pytest.approx(np.cumsum(fees))
    expected = np.array([1_000, 500, 500, 500]) - np.cumsum(fees)
    assert result.report["account"].tolist() == pytest.approx(expected)
    # Returns are before costs: the fee is in `cost`.
    assert result.report["return"].tolist() == pytest.approx([0, -0.5, 0, 0])
    assert result.report["cost"].iloc[1] == pytest.approx(0.0005)
    result.check()
    assert run(strategy, source).lending_fees.sum() == 0


def test_the_first_return_of_an_initial_portfolio(days):
    source = bars({"A": [10, 11, 11]})
    scores = score_table({"A": [1, 1]}, days)
    account = {"cash": 100.0, "A": {"amount": 10, "price": 10.0}}
    assert run(topk(scores), source, account=account).report["return"].iloc[0] == pytest.approx(
        10 / 200
    )
    # Qlib compares the account with the cash alone.
    qlib = run(topk(scores), source, account=account, as_qlib=True)
    assert qlib.report["return"].iloc[0] == pytest.approx(110 / 100)


def test_an_unknown_rule_for_delistings_is_rejected(days):
    with pytest.raises(ConfigError, match="delisting"):
        run(topk(score_table({"A": [1]}, days)), bars({"A": [10, 10]}), delisting="sell")
