"""Questions about an exchange's quotes, the same for Qlib and for qtorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

SPAN = ("2019-03-01", "2019-04-30")
SETTINGS = {"freq": "day", "start_time": SPAN[0], "end_time": SPAN[1], "trade_unit": 100}
# Qlib judges a limit by the close, whatever the price of an order: one of the two at a time.
EXCHANGES = (
    {**SETTINGS, "deal_price": "close", "limit_threshold": 0.03},
    {**SETTINGS, "deal_price": ("$close", "$open"), "limit_threshold": None},
)


def answer_all(exchange: Any, names: list[str], days: list[pd.Timestamp], sides: Any) -> dict:
    """Answer the questions for each instrument and day; `sides` are those of selling and buying."""
    sell, buy = sides
    random = np.random.default_rng(0)
    answers: dict[str, Any] = {}
    for day in days:
        bar = day, day + pd.Timedelta(days=1) - pd.Timedelta(seconds=1)
        amounts = {name: float(1000 * random.random()) for name in names}
        for name in names:
            single = name, *bar
            answers[f"{name} {day.date()}"] = [
                number(exchange.get_close(*single)),
                number(exchange.get_volume(*single)),
                number(exchange.get_deal_price(*single, direction=sell)),
                number(exchange.get_deal_price(*single, direction=buy)),
                number(exchange.get_factor(*single)),
                *restrictions(exchange, single, (None, sell, buy)),
            ]
            if not exchange.check_stock_suspended(*single):
                unit = exchange.get_amount_of_trade_unit(None, *single)
                rounded = exchange.round_amount_by_trade_unit(amounts[name], None, *single)
                answers[f"{name} {day.date()}"] += [number(unit), number(rounded)]
        answers[f"portfolio {day.date()}"] = answer_portfolio(exchange, bar, amounts, names)
    bars = days[0], days[-1]
    for name in (n for n in names if not exchange.check_stock_suspended(n, *bars)):
        answers[f"{name} all days"] = [
            number(exchange.get_close(name, *bars)),
            number(exchange.get_close(name, *bars, method="mean")),
            number(exchange.get_volume(name, *bars)),
            bool(exchange.check_stock_limit(name, *bars)),
        ]
    return answers


def restrictions(exchange: Any, single: Any, directions: Any) -> list[bool]:
    """Whether an instrument is suspended and tradable, and if it has a bar, whether limited.

    Without a bar Qlib calls it limited if its file has a missing value, but not if it has none.
    """
    is_suspended = bool(exchange.check_stock_suspended(*single))
    checks = [is_suspended]
    for direction in directions:
        if not is_suspended:
            checks.append(bool(exchange.check_stock_limit(*single, direction=direction)))
        checks.append(bool(exchange.is_stock_tradable(*single, direction=direction)))
    return checks


def answer_portfolio(exchange: Any, bar: Any, amounts: dict[str, float], names: list[str]) -> list:
    """The value of a portfolio, the amounts of weights, and the orders that lead to them."""
    weights = {name: 1 / len(names) for name in names[1:]}
    target = exchange.generate_amount_position_from_weight_position(weights, 1e6, *bar)
    orders = exchange.generate_order_for_target_amount_position(
        target_position=target, current_position=amounts, start_time=bar[0], end_time=bar[1]
    )
    return [
        number(exchange.calculate_amount_position_value(amounts, *bar, only_tradable=True)),
        {name: number(amount) for name, amount in target.items()},
        [[order.stock_id, int(order.direction), number(order.amount)] for order in orders],
    ]


def number(value: Any) -> float | None:
    """A number with ten digits; None for a missing one."""
    return None if value is None or np.isnan(value) else float(f"{value:.10g}")
