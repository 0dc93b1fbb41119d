"""Positions by date, and an exchange's answers about single instruments, as in Qlib."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_market import bars, score_table

from qtorch.backtest import (
    Exchange,
    Order,
    OrderDir,
    Position,
    Positions,
    TopkDropoutStrategy,
    backtest,
)
from qtorch.core.errors import ConfigError, LoadObjectError
from qtorch.core.serial import State
from qtorch.data import SyntheticSource, write_qlib
from qtorch.tracking.artifacts import read_object, write_object

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import quote_cases  # noqa: E402

CLOSES = {"A": [10, 11, 12, 12], "B": [5, 5, np.nan, 6], "C": [8, 8, 8, 8]}
DAYS = pd.bdate_range("2020-01-01", periods=4)


@pytest.fixture
def exchange():
    market = bars(CLOSES, factor={name: [2.0] * 4 for name in CLOSES})
    return Exchange(source=market, trade_unit=100, limit_threshold=0.095, deal_price="close")


def test_quotes_of_single_bars_worked_by_hand(exchange):
    assert exchange.get_close("A", DAYS[1], DAYS[1]) == 11
    assert exchange.get_close("A", "2020-01-01", "2020-01-03") == 12
    assert np.isnan(exchange.get_close("B", DAYS[2], DAYS[2]))
    assert exchange.get_close("B", DAYS[1], DAYS[2]) == 5  # the last one that is not missing
    assert exchange.get_close("B", DAYS[0], DAYS[3], method=None).tolist()[:2] == [5, 5]
    assert exchange.get_volume("A", DAYS[0], DAYS[1]) == 2e6
    assert exchange.get_close("D", DAYS[1], DAYS[1]) is None
    assert exchange.get_close("A", "2030-01-01", "2030-01-02") is None
    assert exchange.get_deal_price("A", DAYS[1], DAYS[1], OrderDir.BUY) == 11
    assert exchange.check_stock_suspended("B", DAYS[2], DAYS[2])
    assert exchange.check_stock_suspended("D", DAYS[2], DAYS[2])
    # A rose by 10% on the second day: it can be sold, not bought.
    assert exchange.check_stock_limit("A", DAYS[1], DAYS[1], direction="buy")
    assert not exchange.check_stock_limit("A", DAYS[1], DAYS[1], direction=Order.SELL)
    assert not exchange.is_stock_tradable("A", DAYS[1], DAYS[1])
    assert exchange.check_order(Order("A", 1.0, OrderDir.SELL, DAYS[1], DAYS[1]))
    with pytest.raises(ConfigError, match=r"Did you mean '\$close'"):
        exchange.get_quote_info("A", DAYS[1], DAYS[1], "$clos")


def test_amounts_in_trade_units_worked_by_hand(exchange):
    # A factor of 2: a lot of 100 shares is 50 adjusted shares.
    assert exchange.get_amount_of_trade_unit(2.0) == 50
    assert exchange.get_amount_of_trade_unit(None, "A", DAYS[0], DAYS[0]) == 50
    assert exchange.round_amount_by_trade_unit(149.0, factor=2.0) == 100
    assert exchange.get_real_deal_amount(20.0, 0.0, 2.0) == -20.0  # odd lots are sold as a whole
    assert exchange.get_real_deal_amount(120.0, 10.0, 2.0) == -100.0
    with pytest.raises(ConfigError, match="needs a factor, or stock_id"):
        exchange.round_amount_by_trade_unit(10.0)
    value = exchange.calculate_amount_position_value({"A": 2, "C": 1}, DAYS[0], DAYS[0])
    assert value == 2 * 10 + 8
    orders = exchange.generate_order_for_target_amount_position(
        {"C": 260.0}, {"B": 20.0, "A": 50.0}, DAYS[3], DAYS[3]
    )
    # B rose by 20%, at the limit: its sale is left out, as that of all that have a limit.
    assert [(o.stock_id, o.amount_delta) for o in orders] == [("A", -50.0), ("C", 250.0)]
    weights = {"A": 0.25, "C": 0.25}
    amounts = exchange.generate_amount_position_from_weight_position(weights, 100, DAYS[0], DAYS[0])
    assert amounts == {"A": 5.0, "C": 6.0}
    with pytest.raises(ConfigError, match="not exceed 1 in sum"):
        exchange.generate_amount_position_from_weight_position({"A": 0.9, "C": 0.9}, 1, *DAYS[:2])


def test_positions_by_date_are_those_of_the_frames():
    market = bars({"A": [10, 11, 12, 12], "B": [5, 5, 6, 6]})
    scores = score_table({"A": [1, 1, 0], "B": [0, 0, 1]}, DAYS)
    result = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1),
        account=1000.0,
        exchange_kwargs={"min_cost": 0.0, "limit_threshold": "none", "trade_unit": None},
        source=market,
    )
    positions = result.positions_normal
    assert list(positions) == list(result.dates)
    for date, position in positions.items():
        day = result.positions.loc[date]
        assert position.get_stock_list() == list(day.index)
        assert position.get_stock_amount_dict() == day["amount"].to_dict()
        assert position.get_cash() == result.report.loc[date, "cash"]
        assert position.calculate_value() == pytest.approx(result.report.loc[date, "account"])
        assert position.get_stock_weight_dict() == pytest.approx(day["weight"].to_dict())
        assert sum(position.get_stock_weight_dict(only_stock=True).values()) == pytest.approx(1)
    last = positions["2020-01-06"]
    (name,) = last.get_stock_list()
    assert last.position[name]["count_day"] == last.get_stock_count(name, "day")
    assert last.position["now_account_value"] == pytest.approx(last.calculate_value())
    assert last.get_stock_price(name) == 6
    assert not last.check_stock("A")
    assert last.get_stock_amount("A") == 0
    with pytest.raises(ConfigError, match="unknown instrument of the position 'A'"):
        last.get_stock_weight("A")
    with pytest.raises(KeyError):
        positions["2021-01-01"]
    assert Position(5.0, {"A": {"amount": 2, "price": 3.0}}).calculate_value() == 11.0


def test_a_position_has_the_cash_of_sales_that_settles_later():
    market = bars({"A": [10, 10, 10, 10], "B": [5, 5, 5, 5]})
    scores = score_table({"A": [1, 0, 0], "B": [0, 1, 1]}, DAYS)
    result = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1),
        executor={"class": "SimulatorExecutor", "kwargs": {"settle_type": "cash"}},
        account=1000.0,
        exchange_kwargs={"min_cost": 0.0, "limit_threshold": "none", "trade_unit": None},
        source=market,
    )
    position = result.positions_normal[DAYS[2]]
    assert position.get_cash(include_settle=True) > position.get_cash() + 500
    assert position.calculate_value() == pytest.approx(result.report.loc[DAYS[2], "account"])


def test_positions_are_stored_without_pickle_and_read_back_with_their_cash(tmp_path):
    market = bars({"A": [10, 10, 10, 10], "B": [5, 5, 5, 5]})
    scores = score_table({"A": [1, 0, 0], "B": [0, 1, 1]}, DAYS)
    positions = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1),
        executor={"class": "SimulatorExecutor", "kwargs": {"settle_type": "cash"}},
        account=1000.0,
        exchange_kwargs={"min_cost": 0.0, "limit_threshold": "none", "trade_unit": None},
        source=market,
    ).positions_normal
    path = write_object(positions, tmp_path, "positions_normal_1day.pkl")
    assert path.suffix == ".safetensors"
    stored = read_object(path, "positions_normal_1day.pkl")
    pd.testing.assert_frame_equal(stored.frame, positions.frame)
    assert [p.position for p in stored.values()] == [p.position for p in positions.values()]
    assert any("cash_delay" in p.position for p in stored.values())
    assert list(stored) == list(positions)
    money = pd.DataFrame({"cash": [1.0], "account": [1.0], "value": [0.0]}, DAYS[:1])
    empty = Positions(positions.frame.iloc[:0], money)
    stored = read_object(write_object(empty, tmp_path, "empty.pkl"), "empty.pkl")
    assert stored[DAYS[0]].get_stock_list() == []
    state = positions.to_state()
    with pytest.raises(LoadObjectError, match="in format 2 by a newer qtorch"):
        Positions.from_state(State({**state.config, "format": 2}, state.tensors))


@pytest.mark.qlib
def test_answers_equal_those_of_qlib(qlib_python, tmp_path):
    market = SyntheticSource(12, "2019-01-01", "2019-06-28", seed=3)
    provider = str(write_qlib(market, tmp_path / "market"))
    names = sorted(market.instruments("stocks"))
    days = list(market.calendar(*quote_cases.SPAN))[:20]
    job, out = tmp_path / "job.json", tmp_path / "answers.json"
    content = {"provider": provider, "names": names, "days": list(map(str, days))}
    job.write_text(json.dumps(content))
    script = ROOT / "scripts" / "parity" / "qlib_quotes.py"
    subprocess.run([qlib_python, str(script), str(job), str(out)], check=True, capture_output=True)
    answers = [
        quote_cases.answer_all(
            Exchange(codes=names, source=provider, **settings), names, days, tuple(OrderDir)
        )
        for settings in quote_cases.EXCHANGES
    ]
    assert json.loads(json.dumps(answers)) == json.loads(out.read_text())
