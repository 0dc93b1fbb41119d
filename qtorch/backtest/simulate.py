"""The simulation loop: run a strategy bar by bar for all members at the same time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, Fills, Orders
from qtorch.backtest.exchange import Exchange, Floats, Indices, Quotes
from qtorch.backtest.market import Market
from qtorch.backtest.scores import Scores
from qtorch.backtest.strategy import StepContext, Strategy, refuse_old_strategy_names


@dataclass
class Ledger:
    """The records of a simulation, one list entry per bar; arrays by member are `[M]`.

    `positions`: member, instrument, amount, price, bars held and fraction of the account of each
    position at the end of the bar. `orders`: the orders and their fills.
    """

    dates: list[pd.Timestamp] = field(default_factory=list)
    account: list[Floats] = field(default_factory=list)
    cash: list[Floats] = field(default_factory=list)
    value: list[Floats] = field(default_factory=list)
    cost: list[Floats] = field(default_factory=list)
    turnover: list[Floats] = field(default_factory=list)
    positions: list[tuple[Indices, Indices, Floats, Floats, Floats, Floats]] = field(
        default_factory=list
    )
    orders: list[tuple[Orders, Fills]] = field(default_factory=list)

    def record_bar(
        self, date: pd.Timestamp, account: Account, orders: Orders, fills: Fills
    ) -> None:
        """Append the state at the end of a bar."""
        holdings = account.holdings()
        value = holdings + (account.cash + account.unsettled_cash)
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
    """Run a strategy over the bars of `quotes`; updates `account` in place.

    The scores of a bar are traded at the next bar. `scores` cover the dates of the quotes and some
    of their instruments. `buy_first` executes purchases before sales, so that the proceeds of a
    sale cannot pay for a purchase on the same bar.
    """
    refuse_old_strategy_names(strategy)
    ledger = Ledger()
    column = None if scores is None else quotes.instruments.get_indexer(scores.instruments)
    traded_today = np.zeros_like(account.amount)
    previous = Market(exchange, quotes, 0) if quotes.first else None
    for row in range(quotes.first, len(quotes.dates)):
        market = Market(exchange, quotes, row)
        if previous is None or previous.date.normalize() != market.date.normalize():
            traded_today[:] = 0.0
        score = _expand_scores(scores, column, row - 1, account.amount.shape)
        step = row - quotes.first
        context = StepContext(step, quotes.instruments, score, market, previous, account)
        orders = strategy.decide(context)
        fills = market.execute(
            orders, account, traded_today, allow_short=strategy.allow_short, buy_first=buy_first
        )
        account.close_bar(market.close)
        ledger.record_bar(market.date, account, orders, fills)
        account.settle()
        previous = market
    return ledger


def _expand_scores(
    scores: Scores | None, column: Indices | None, row: int, shape: tuple[int, ...]
) -> Floats | None:
    """The scores of a bar for all instruments `[M, N]`, or None if the bar has no scores."""
    if scores is None or row < 0 or np.isnan(scores.values[row]).all():
        return None
    assert column is not None
    out = np.full(shape, np.nan)
    out[:, column] = scores.values[row]
    return out
