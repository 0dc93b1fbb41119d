"""The choice of the best and the worst instruments, and orders that are joined from parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from small_market import bars

from qtorch.backtest import Orders, Strategy, backtest
from qtorch.backtest.scores import Scores
from qtorch.backtest.strategy import _choose_lowest


@pytest.mark.parametrize("width", [7, 120, 700])
@pytest.mark.parametrize("num_members", [1, 5])
@pytest.mark.parametrize("count", [0, 3, 6, 1000])
def test_the_lowest_keys_are_those_of_a_stable_sort(num_members, width, count):
    random = np.random.default_rng(width + count)
    keys = np.round(random.normal(size=(num_members, width)), 1)  # many are equal
    keys[random.random(keys.shape) < 0.1] = np.nan
    keys[-1, 2:] = np.nan  # fewer than `count`
    choice = _choose_lowest(keys, count)
    for member, row in enumerate(keys):
        valid = [k for k in range(width) if not np.isnan(row[k])]
        expected = sorted(valid, key=lambda k: row[k])[:count]
        is_filled = choice.is_filled[member]
        assert choice.column[member][is_filled].tolist() == expected
        assert choice.key[member][is_filled].tolist() == row[expected].tolist()


class JoiningStrategy(Strategy):
    """Buys A, then appends the purchase of B to that order."""

    def decide(self, context):
        if context.step:
            return Orders.empty()
        first = np.zeros(1, dtype=np.intp)  # both the member and the instrument
        buying = np.ones(1, dtype=bool)
        return Orders(first, first, np.array([10.0]), buying).append(
            Orders(first, first + 1, np.array([20.0]), buying)
        )


def test_purchases_that_others_are_appended_to_are_executed():
    source = bars({"A": [10, 10], "B": [20, 20]})
    costs = {"open_cost": 0.0, "close_cost": 0.0, "min_cost": 0.0, "trade_unit": None}
    result = backtest(strategy=JoiningStrategy(), source=source, exchange_kwargs=costs)
    assert result.orders["deal_amount"].tolist() == [10, 20]


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_scores_of_a_bar_are_read_from_any_order_of_the_rows(order):
    days = pd.bdate_range("2020-01-01", periods=3)
    names = [f"I{k:02d}" for k in range(30)]
    index = pd.MultiIndex.from_product([days, names[::2]], names=["datetime", "instrument"])
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(len(index), 2)), index, ["a", "b"])
    rows = frame if order == "sorted" else frame.sample(frac=1, random_state=0)
    bar_scores = Scores(rows, days, "day").align(pd.Index(names))
    for bar, day in enumerate(days):
        expected = frame.loc[day].reindex(names).to_numpy().T
        np.testing.assert_array_equal(bar_scores.read(bar), expected)
