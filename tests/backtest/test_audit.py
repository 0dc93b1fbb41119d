"""The audit of a backtest finds numbers that contradict the orders and the bars."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from small_market import bars, score_table

from qtorch.backtest import LongShortStrategy, TopkDropoutStrategy, backtest
from qtorch.core.errors import AuditError

COSTS = {"open_cost": 0.001, "close_cost": 0.002, "min_cost": 1.0, "trade_unit": None}


def run(source, days, members=1, **exchange):
    scores = score_table({"A": [3, 1, 1, 2], "B": [2, 3, 1, 1], "C": [1, 2, 3, 3]}, days)
    frame = pd.DataFrame({f"m{k}": scores for k in range(members)})
    return backtest(
        strategy=TopkDropoutStrategy(signal=frame, topk=2, n_drop=1),
        account=1e4,
        source=source,
        exchange_kwargs={**COSTS, **exchange},
    )


@pytest.fixture
def source():
    close = {"A": [10, 11, 12, 13, 12], "B": [10, 9, 8, 9, 10], "C": [5, 5, np.nan, 5, 6]}
    low, high = ({n: [c + move for c in column] for n, column in close.items()} for move in (-1, 1))
    return bars(close, low=low, high=high)


def test_a_sound_backtest_passes(source, days):
    audit = run(source, days, members=2).check()
    result = run(source, days)
    assert audit.num_days == 4
    assert audit.num_positions == 2 * len(result.positions)
    assert audit.num_orders == 2 * len(result.orders)
    assert audit.num_prices == 2 * (result.orders["deal_amount"] > 0).sum() > 0
    # Without low and high no price is compared.
    assert run(bars({n: [10.0] * 5 for n in "ABC"}), days).check().num_prices == 0


@pytest.mark.parametrize("name", ["account", "cash", "value", "total_cost", "total_turnover"])
def test_a_wrong_sum_of_a_day_is_found(source, days, name):
    result = run(source, days)
    result._ledger.totals[name][2] += 0.01
    with pytest.raises(AuditError, match=f"{days[3]:%Y-%m-%d}: .*expected"):
        result.check()


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ("positions", "amount", "the positions do not follow from the orders"),
        ("positions", "price", "a position is not valued at its last close"),
        ("orders", "deal_amount", "the value or the cost of an order is wrong"),
        ("orders", "value", "turnover and costs are not those of the orders"),
        ("orders", "cost", "the value or the cost of an order is wrong"),
        ("orders", "price", "a price is outside the low and the high of its bar"),
    ],
)
def test_a_wrong_number_of_a_row_is_found(source, days, rows, column, message):
    result = run(source, days, members=2)
    table = getattr(result._ledger, rows)
    table.values[1, table.names.index(column)] *= 1.5
    with pytest.raises(AuditError, match=message):
        result.check()


def test_an_order_without_a_bar_is_found(source, days):
    result = run(source, days)
    order = result._ledger.orders
    result._quotes.close[order.bar[0] + 1, order.instrument[0]] = np.nan
    with pytest.raises(AuditError, match="an order was executed without a bar, 1 time: 2020-01-02"):
        result.check()


def test_a_deal_price_that_never_was_is_found(source, days):
    message = "outside the low and the high.*2020-01-02 A: price 13, low 10, high 12"
    with pytest.raises(AuditError, match=message):
        run(source, days, deal_price="$close+2").check()


@pytest.mark.parametrize("field", ["close", "open"])
def test_a_close_or_open_outside_its_own_bar_is_a_fault_of_the_data(days, caplog, field):
    close = {n: [10.0, 11, 12, 13, 12] for n in "ABC"}
    price = pd.DataFrame(close) if field == "close" else pd.DataFrame(close) + 0.5
    low, high = price - 1, price + 1
    high.loc[1, "A"] = price.loc[1, "A"] - 0.1  # bought on the first day
    source = bars(close, low=low, high=high, open=price)
    assert run(source, days, deal_price=field).check().num_data_faults == 1
    message = f"1 of .* fault of the data: first 2020-01-02 A: price {price.loc[1, 'A']:.10g}, low"
    assert re.search(message, caplog.text)
    # Another price outside the range is an error, in the same bar too.
    with pytest.raises(AuditError, match=r"outside the low and the high.*2020-01-02 A: price"):
        run(source, days, deal_price=f"${field}*1.02").check()


def test_costs_with_impact_and_partial_fills_pass(source, days):
    limits = {"impact_cost": 0.3, "volume_threshold": ("cum", "0.0001*$volume"), "min_cost": 0}
    run(source, days, **limits).check()
    executor = {"kwargs": {"settle_type": "cash"}}
    scores = score_table({"A": [3, 1, 1, 2], "B": [2, 3, 1, 1], "C": [1, 2, 3, 3]}, days)
    strategy = LongShortStrategy(signal=scores, topk=1)
    exchange = {**COSTS, "lending_fee": 0.1, "impact_cost": 0.1}
    account = {"cash": 1e4, "A": {"amount": -20, "price": 10.0}}
    backtest(
        strategy=strategy,
        executor=executor,
        account=account,
        source=source,
        exchange_kwargs=exchange,
    ).check()
