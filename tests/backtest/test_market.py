"""Prices, limits, trade units and costs, checked against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from small_market import bars, score_table

from qtorch.backtest import Orders, Strategy, TopkDropoutStrategy, backtest
from qtorch.core.errors import ConfigError
from qtorch.data.source.frame import FrameSource


class PlannedStrategy(Strategy):
    """Submits planned orders by bar: {step: [(instrument, amount, buying), ...]}."""

    def __init__(self, *, plan, allow_short=False):
        super().__init__()
        self.plan = plan

    def decide(self, context):
        orders = self.plan.get(context.step, [])
        columns = [context.instruments.get_loc(name) for name, _, _ in orders]
        return Orders(
            np.zeros(len(orders), dtype=np.intp),
            np.array(columns, dtype=np.intp),
            np.array([amount for _, amount, _ in orders], dtype=float),
            np.array([buying for _, _, buying in orders], dtype=bool),
        )


def run(source, plan, cash=10_000.0, benchmark=None, executor=None, **exchange):
    costs = {"open_cost": 0.0, "close_cost": 0.0, "min_cost": 0.0, "trade_unit": None}
    return backtest(
        strategy=PlannedStrategy(plan=plan),
        account=cash,
        benchmark=benchmark,
        executor=executor,
        exchange_kwargs={**costs, **exchange},
        source=source,
    )


def test_cash_and_value_of_one_purchase_and_its_sale():
    source = bars({"A": [10, 10, 11, 12, 12]})
    result = run(
        source,
        {1: [("A", 100, True)], 3: [("A", 100, False)]},
        open_cost=0.001,
        close_cost=0.002,
        min_cost=1.5,
    )
    # Buying: 1000 plus the minimum cost of 1.5 (0.1% would be 1). Selling: 1200 less 2.4.
    report = result.report
    assert report["cash"].tolist() == pytest.approx([10_000, 8_998.5, 8_998.5, 10_196.1, 10_196.1])
    assert report["value"].tolist() == pytest.approx([0, 1_000, 1_100, 0, 0])
    assert report["account"].tolist() == pytest.approx(
        [10_000, 9_998.5, 10_098.5, 10_196.1, 10_196.1]
    )
    assert report["total_cost"].tolist() == pytest.approx([0, 1.5, 1.5, 3.9, 3.9])
    assert report["return"].iloc[1] == pytest.approx(0)  # before costs
    assert report["cost"].iloc[3] == pytest.approx(2.4 / 10_098.5)
    assert report["turnover"].iloc[3] == pytest.approx(1_200 / 10_098.5)
    assert report["bench"].isna().all()
    positions = result.positions
    assert positions["count"].tolist() == [1, 2]
    assert positions["weight"].tolist() == pytest.approx([1_000 / 9_998.5, 1_100 / 10_098.5])


class AskingStrategy(PlannedStrategy):
    """Asks on each bar what the sale of its whole positions would yield."""

    def decide(self, context):
        account = context.account
        prices, counts = account.price.copy(), account.count.copy()
        sales = Orders.from_mask(account.is_held, account.amount, buying=False)
        self.proceeds = context.proceeds(sales)
        np.testing.assert_array_equal(account.price, prices)
        np.testing.assert_array_equal(account.count, counts)
        return super().decide(context)


def test_asking_for_the_proceeds_of_sales_changes_no_account():
    strategy = AskingStrategy(plan={0: [("A", 100, True)]})
    costs = {"open_cost": 0.0, "close_cost": 0.01, "min_cost": 0.0, "trade_unit": None}
    source = bars({"A": [10, 10, 12]})
    result = backtest(strategy=strategy, account=1e4, exchange_kwargs=costs, source=source)
    assert strategy.proceeds.tolist() == pytest.approx([1_200 * 0.99])
    assert result.positions["count"].tolist() == [1, 2, 3]


def test_purchases_use_up_the_cash_in_order():
    source = bars({"A": [10, 10], "B": [20, 20], "C": [5, 5]})
    plan = {0: [("C", 400, True), ("A", 600, True), ("B", 300, True)]}
    orders = run(source, plan, open_cost=0.01).orders
    # C costs 2000 + 20 and A 6000 + 60; B is reduced to what the remaining 1920 can buy.
    deal_amount = orders["deal_amount"].droplevel(0)
    assert deal_amount[["C", "A"]].tolist() == pytest.approx([400, 600])
    assert deal_amount["B"] == pytest.approx(1_920 / 1.01 / 20)
    assert run(source, plan, open_cost=0.01).report["cash"].iloc[0] == pytest.approx(0, abs=1e-6)


def test_trade_is_rejected_if_cash_does_not_cover_the_cost():
    source = bars({"A": [10, 10]})
    orders = run(source, {0: [("A", 1, True)]}, cash=4.0, min_cost=5.0).orders
    assert orders["deal_amount"].tolist() == [0]


def test_amounts_are_rounded_to_lots_of_raw_shares():
    # With a factor of 0.5, a lot of 100 raw shares is 200 adjusted shares.
    source = bars({"A": [20, 20]}, factor={"A": [0.5, 0.5]})
    orders = run(source, {0: [("A", 333, True)]}, trade_unit=100).orders
    assert orders["deal_amount"].tolist() == [200]


def test_selling_a_whole_position_includes_odd_lots():
    source = bars({"A": [10, 10, 10]})
    account = {"cash": 0.0, "A": {"amount": 123, "price": 10.0}}
    plan = {0: [("A", 23, False)], 1: [("A", 123, False)]}
    result = run(source, plan, cash=account, trade_unit=100)
    assert result.orders["deal_amount"].tolist() == [0, 123]
    assert result.report["account"].tolist() == [1_230] * 3
    assert result.report["return"].tolist() == [0] * 3  # the initial portfolio is not a profit


def test_no_trade_when_suspended_or_at_the_limit():
    nan = np.nan
    source = bars({"A": [10, nan, 12, 9, 9], "B": [10, 10, 10, 10, 10]})
    plan = {k: [("A", 10, True), ("B", 1, True)] for k in range(5)}
    deal_amount = run(source, plan, limit_threshold=0.15).orders["deal_amount"].xs("A", level=1)
    # Suspended on the second day.
    assert deal_amount.tolist()[:2] == [10, 0]
    plan = {0: [("A", 30, True)], 3: [("A", 10, False)], 4: [("A", 10, False)]}
    deal_amount = run(source, plan, limit_threshold=0.15).orders["deal_amount"]
    assert deal_amount.tolist() == [30, 0, 10]  # -25% on the fourth day, so no selling


def test_limit_expressions_and_separate_buy_and_sell_prices():
    source = bars(
        {"A": [10, 10, 10]}, open={"A": [8, 8, 8]}, shut={"A": [0, 1, 0]}, high={"A": [12, 12, 12]}
    )
    plan = {k: [("A", 10, True)] for k in range(3)}
    result = run(source, plan, limit_threshold=("$shut", "$shut>5"), deal_price=("high", "open"))
    assert result.orders["price"].tolist()[0] == 12
    assert result.orders["deal_amount"].tolist() == [10, 0, 10]


def test_missing_deal_price_falls_back_to_the_close(caplog):
    source = bars({"A": [10, 10]}, open={"A": [np.nan, 0.0]})
    with caplog.at_level("WARNING"):
        result = run(source, {k: [("A", 10, True)] for k in range(2)}, deal_price="open")
    assert result.orders["price"].tolist() == [10, 10]
    assert "2 of 2 prices to buy" in caplog.text


def test_impact_cost_is_quadratic_in_the_volume_share():
    source = bars({"A": [10, 10]}, volume={"A": [1_000, 1_000]})
    orders = run(source, {0: [("A", 100, True)]}, impact_cost=0.5, open_cost=0.001).orders
    assert orders["cost"].tolist() == pytest.approx([1_000 * (0.001 + 0.5 * 0.1**2)])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (("current", "0.1*$volume"), [100, 80]),
        ({"sell": ("cum", "0.05*$volume")}, [200, 50]),
        ({"all": ("current", "0.1*$volume"), "buy": ("current", "$volume*0+30")}, [30, 30]),
    ],
)
def test_volume_threshold_limits_amounts(threshold, expected):
    source = bars({"A": [10, 10]}, volume={"A": [1_000, 1_000]})
    plan = {0: [("A", 200, True)], 1: [("A", 80, False)]}
    orders = run(source, plan, volume_threshold=threshold).orders
    assert orders["deal_amount"].tolist() == pytest.approx(expected)


def test_cash_settlement_delays_proceeds():
    source = bars({"A": [10, 10, 10], "B": [10, 10, 10]})
    plan = {1: [("A", 100, False), ("B", 100, True)], 2: [("B", 100, True)]}
    account = {"cash": 0.0, "A": {"amount": 100, "price": 10.0}}
    immediate = run(source, plan, cash=dict(account))
    assert immediate.orders["deal_amount"].tolist()[:2] == [100, 100]
    executor = {"class": "SimulatorExecutor", "kwargs": {"settle_type": "cash"}}
    delayed_result = run(source, plan, cash=dict(account), executor=executor)
    assert delayed_result.orders["deal_amount"].tolist() == [100, 0, 100]
    assert delayed_result.report["account"].tolist() == [1_000] * 3
    assert delayed_result.report["cash"].tolist() == [0, 0, 0]
    executor = {"class": "SimulatorExecutor", "kwargs": {"trade_type": "parallel"}}
    buys_first = run(source, plan, cash=dict(account), executor=executor)
    assert buys_first.orders["deal_amount"].tolist() == [100, 0, 100]


def test_benchmark_returns():
    source = bars({"A": [10, 11, 11], "B": [10, 10, 9]})
    for benchmark, expected in (
        ("A", [0, 0.1, 0]),
        (["A", "B"], [0, 0.05, -0.05]),
        ("all", [0, 0.05, -0.05]),
        (
            pd.Series([0.5, 0.25], index=pd.to_datetime(["2020-01-01", "2020-01-02"])),
            [0.5, 0.25, 0],
        ),
    ):
        bench = run(source, {}, benchmark=benchmark).report["bench"]
        assert bench.tolist() == pytest.approx(expected, abs=1e-7)


def test_strategy_reads_subscribed_fields():
    source = bars({"A": [10, 10, 10]}, open={"A": [7, 8, 9]})
    values = []

    class FieldReader(PlannedStrategy):
        def decide(self, context):
            values.append((context.market.field("open")[0], context.market.field("$close/2")[0]))
            with pytest.raises(ConfigError, match="subscribed field"):
                context.market.field("high")
            return super().decide(context)

    exchange = {"subscribe_fields": ["open", "$close/2"], "trade_unit": None}
    backtest(strategy=FieldReader(plan={}), account=1e4, exchange_kwargs=exchange, source=source)
    assert values == [(7, 5), (8, 5), (9, 5)]


def test_extra_quotes_can_be_traded(days):
    source = bars({"A": [10, 10, 10]})
    index = pd.MultiIndex.from_product([["ETF"], days[:3]], names=["instrument", "datetime"])
    extra = pd.DataFrame(
        {"$close": [1.0, 2.0, 3.0], "limit_buy": [True, False, False]}, index=index
    )
    result = run(source, {k: [("ETF", 5, True)] for k in range(3)}, extra_quote=extra)
    assert result.orders["deal_amount"].tolist() == [0, 5, 5]
    assert result.report["value"].tolist() == [0, 10, 30]
    with pytest.raises(ConfigError, match=r"\$close"):
        run(source, {}, extra_quote=extra[["limit_buy"]])


# -- cases that Qlib gets wrong ----------------------------------------------------------------


def test_n_drop_zero_sells_nothing(days):
    """Qlib's `list[-0:]` is the whole list, so with n_drop=0 it sells everything."""
    source = bars({n: [10] * 4 for n in "ABC"})
    scores = score_table({"A": [3, 1, 1], "B": [2, 3, 3], "C": [1, 2, 2]}, days)
    result = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=0),
        account=1e4,
        source=source,
        exchange_kwargs={"trade_unit": None},
    )
    assert result.positions.index.get_level_values(1).unique().tolist() == ["A"]


def test_overfull_portfolio_buys_nothing(days):
    """With five holdings, topk 2 and n_drop 1 the number of candidates is negative.

    Qlib then slices from the end (`today[:-2]`): all instruments not held but the two worst become
    candidates.
    """
    source = bars({n: [10] * 4 for n in "ABCDEFGHI"})
    scores = score_table({n: [9 - k] * 3 for k, n in enumerate("IHGFEDCBA")}, days)
    account = {"cash": 0.0, **dict.fromkeys("ABCDE", 100.0)}
    result = backtest(
        "2020-01-02",
        "2020-01-02",
        TopkDropoutStrategy(signal=scores, topk=2, n_drop=1, hold_thresh=0),
        account=account,
        source=source,
        exchange_kwargs={"trade_unit": None},
    )
    # The worst of the five is sold; nothing is bought because four are still held.
    assert result.orders["direction"].droplevel(0).to_dict() == {"A": "sell"}
    assert len(result.positions) == 4


def test_intraday_bars():
    times = pd.DatetimeIndex(
        [f"2020-01-0{d} {h}:{m}" for d in (2, 3) for h, m in ((9, 30), (10, "00"), (10, 30))]
    )
    index = pd.MultiIndex.from_product([times, ["A", "B"]], names=["datetime", "instrument"])
    frame = pd.DataFrame({"close": 10.0, "volume": 1_000.0, "factor": 1.0}, index=index)
    source = FrameSource(frame, freq="30min")
    stamps = times - pd.Timedelta(minutes=0)
    score_index = pd.MultiIndex.from_product([stamps, ["A", "B"]], names=["datetime", "instrument"])
    scores = pd.Series([1, 0, 0, 1] * 3, index=score_index, dtype=float)
    result = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1),
        account=1e4,
        executor={"class": "SimulatorExecutor", "kwargs": {"time_per_step": "30min"}},
        exchange_kwargs={"trade_unit": None, "volume_threshold": ("cum", "0.1*$volume")},
        source=source,
    )
    assert result.freq == "30min"
    assert len(result.report) == 5
    # The cumulative limit is 100 shares per instrument and day; it resets on the next day.
    purchases = result.orders.query("direction == 'buy'")["deal_amount"]
    by_day = purchases.groupby(
        [purchases.index.get_level_values(0).normalize(), "instrument"]
    ).sum()
    assert (by_day <= 100).all()
    assert by_day.max() == 100
