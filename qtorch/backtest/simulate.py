"""The days of a backtest, one after another, for all members at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.market import Market
from qtorch.backtest.orders import Fills, Orders
from qtorch.backtest.quotes import Floats, Places, Quotes
from qtorch.backtest.scores import Scores
from qtorch.backtest.strategy import Moment, Strategy


@dataclass
class Ledger:
    """What a simulation leaves, bar by bar; arrays by member are `[M]`.

    `positions`: member, instrument, amount, price, bars held and share of the account of each
    position at the bar's end. `orders`: the orders and their fills.
    """

    dates: list[pd.Timestamp] = field(default_factory=list)
    account: list[Floats] = field(default_factory=list)
    cash: list[Floats] = field(default_factory=list)
    value: list[Floats] = field(default_factory=list)
    cost: list[Floats] = field(default_factory=list)
    turnover: list[Floats] = field(default_factory=list)
    positions: list[tuple[Places, Places, Floats, Floats, Floats, Floats]] = field(
        default_factory=list
    )
    orders: list[tuple[Orders, Fills]] = field(default_factory=list)

    def close(self, date: pd.Timestamp, account: Account, orders: Orders, fills: Fills) -> None:
        """Write a bar down."""
        holdings = account.holdings()
        value = holdings + (account.cash + account.delayed)
        self.dates.append(date)
        self.account.append(value)
        self.cash.append(account.cash.copy())
        self.value.append(holdings)
        self.cost.append(account.cost.copy())
        self.turnover.append(account.turnover.copy())
        member, instrument = np.nonzero(account.amount)
        amount, price = account.amount[member, instrument], account.price[member, instrument]
        count = account.count[member, instrument].astype(np.float64)
        weight = amount * price / value[member]
        self.positions.append((member, instrument, amount, price, count, weight))
        self.orders.append((orders, fills))


def simulate(
    exchange: Exchange,
    quotes: Quotes,
    strategy: Strategy,
    scores: Scores | None,
    account: Account,
    *,
    buy_first: bool = False,
) -> Ledger:
    """Run a strategy over the bars of `quotes`; `account` is moved along.

    The scores of a bar are traded at the next one. `scores` lie over the dates of the quotes and
    a part of their instruments. `buy_first` deals purchases before sales, so that no sale pays
    for a purchase of the same bar.
    """
    ledger = Ledger()
    place = None if scores is None else quotes.instruments.get_indexer(scores.instruments)
    dealt = np.zeros_like(account.amount)
    before = Market(exchange, quotes, 0) if quotes.first else None
    for row in range(quotes.first, len(quotes.dates)):
        market = Market(exchange, quotes, row)
        if before is None or before.date.normalize() != market.date.normalize():
            dealt[:] = 0.0
        score = _spread(scores, place, row - 1, account.amount.shape)
        step = row - quotes.first
        now = Moment(step, quotes.instruments, score, market, before, account)
        orders = strategy.decide(now)
        fills = market.deal(orders, account, dealt, short=strategy.short, buy_first=buy_first)
        account.close_bar(market.close)
        ledger.close(market.date, account, orders, fills)
        account.settle()
        before = market
    return ledger


def _spread(
    scores: Scores | None, place: Places | None, row: int, shape: tuple[int, ...]
) -> Floats | None:
    """A bar's scores over all instruments `[M, N]`; None where there are none."""
    if scores is None or row < 0 or np.isnan(scores.values[row]).all():
        return None
    assert place is not None
    out = np.full(shape, np.nan)
    out[:, place] = scores.values[row]
    return out
