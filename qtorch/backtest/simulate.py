"""The simulation loop: run a strategy bar by bar for all members at the same time."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.backtest.account import MONEY, Account, Fills, Orders
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.market import Market
from qtorch.backtest.quotes import Floats, Indices, Quotes
from qtorch.backtest.scores import Scores
from qtorch.backtest.strategy import StepContext, Strategy, refuse_old_strategy_names

Delisting: TypeAlias = Literal["last_close", "zero", "keep"]
DELISTINGS = ("last_close", "zero", "keep")
POSITION = ("amount", "price", "count", "weight")
ORDER = ("buying", "amount", "deal_amount", "price", "value", "cost")
ENDING = ("amount", "price", "value")
_YEAR = pd.Timedelta(days=365)
_BLOCK_ROWS = 8192

log = logging.getLogger(__name__)


class Rows(ABC):
    """Rows of several columns, bar by bar, each of a member and an instrument.

    `bar`, `member` and `instrument [K]` are indices; `values [K, C]` are the columns `names`.
    """

    names: tuple[str, ...]

    @property
    @abstractmethod
    def bar(self) -> Indices:
        """`[K]`: the bar of each row."""

    @property
    @abstractmethod
    def member(self) -> Indices:
        """`[K]`: the member of each row."""

    @property
    @abstractmethod
    def instrument(self) -> Indices:
        """`[K]`: the instrument of each row."""

    @property
    @abstractmethod
    def values(self) -> Floats:
        """`[K, C]`: the columns."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    def column(self, name: str) -> Floats:
        """The values `[K]` of a column."""
        values: Floats = self.values[:, self.names.index(name)]
        return values

    @cached_property
    def _member_order(self) -> tuple[Indices, Indices]:
        order = np.argsort(self.member, kind="stable")
        return order, self.member[order]

    def of_member(self, member: int) -> Indices:
        """The rows of a member, bar by bar."""
        order, members = self._member_order
        first, last = members.searchsorted(np.array([member, member + 1]))
        return order[first:last]


class CollectedRows(Rows):
    """Rows whose columns are collected bar by bar."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._parts: list[tuple[int, Indices, Indices, tuple[NDArray[Any], ...]]] = []

    def append(
        self, bar: int, member: Indices, instrument: Indices, *columns: NDArray[Any]
    ) -> None:
        """Append one bar's rows; nothing for none."""
        if len(member):
            self._parts.append((bar, member, instrument, columns))

    def __len__(self) -> int:
        return sum(len(part[1]) for part in self._parts)

    @cached_property
    def bar(self) -> Indices:
        bars = [part[0] for part in self._parts]
        return np.repeat(np.array(bars, dtype=np.intp), [len(part[1]) for part in self._parts])

    @cached_property
    def member(self) -> Indices:
        return _concatenate([part[1] for part in self._parts], np.intp)

    @cached_property
    def instrument(self) -> Indices:
        return _concatenate([part[2] for part in self._parts], np.intp)

    @cached_property
    def values(self) -> Floats:
        values = np.empty((len(self), len(self.names)))
        for k in range(len(self.names)):
            values[:, k] = _concatenate([part[3][k] for part in self._parts], np.float64)
        return values


class PositionRows(Rows):
    """The positions at the end of each bar; most of their numbers are calculated when read.

    `prices [D, N]` are the last closes, `money [D, 5, M]` those of the accounts; both are filled
    bar by bar, as the positions are added.
    """

    def __init__(self, prices: Floats, money: Floats) -> None:
        self.names = POSITION
        self.prices, self.money = prices, money
        self._bars: list[int] = []
        self._parts: list[tuple[Indices, Floats, NDArray[np.int32]]] = []

    def add_bar(self, bar: int, account: Account) -> None:
        """Add the positions of all members."""
        places = account.places()
        if len(places):
            self._bars.append(bar)
            amount = account.amount.reshape(-1)[places]
            self._parts.append((places, amount, account.count_bars(places)))

    def __len__(self) -> int:
        return sum(len(part[0]) for part in self._parts)

    @cached_property
    def bar(self) -> Indices:
        bars = np.array(self._bars, dtype=np.intp)
        return np.repeat(bars, [len(part[0]) for part in self._parts])

    @cached_property
    def _place(self) -> Indices:
        return _concatenate([part[0] for part in self._parts], np.intp)

    @cached_property
    def member(self) -> Indices:
        member: Indices = self._place // self.prices.shape[1]
        return member

    @cached_property
    def instrument(self) -> Indices:
        instrument: Indices = self._place % self.prices.shape[1]
        return instrument

    @cached_property
    def values(self) -> Floats:
        amount = _concatenate([part[1] for part in self._parts], np.float64)
        price = self.prices[self.bar, self.instrument]
        count = _concatenate([part[2] for part in self._parts], np.float64)
        weight = amount * price / self.account_value[self.bar, self.member]
        return np.stack((amount, price, count, weight), axis=1)

    @cached_property
    def value(self) -> Floats:
        """`[D, M]`: the value of all positions of a member."""
        num_members, num_instruments = self.money.shape[2], self.prices.shape[1]
        sums = np.zeros((len(self.prices), num_members))
        for begin, end in self._blocks():
            bars, parts = np.array(self._bars[begin:end]), self._parts[begin:end]
            first, last = bars[0], bars[-1] + 1
            place = np.concatenate([part[0] for part in parts])
            value = np.concatenate([part[1] for part in parts])
            row = np.repeat(bars - first, [len(part[0]) for part in parts])
            value *= self.prices[first:last][row, place % num_instruments]
            member = place // num_instruments + row * num_members
            block: Any = np.bincount(member, value, (last - first) * num_members)
            sums[first:last] = block.reshape(-1, num_members)
        return sums

    @cached_property
    def account_value(self) -> Floats:
        """`[D, M]`: the value of the accounts: positions and cash."""
        return self.value + (self.money[:, 0] + self.money[:, 1])

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Split the bars into blocks of about `_BLOCK_ROWS` positions, which stay in the cache."""
        ends = np.cumsum([len(part[0]) for part in self._parts])
        begin = 0
        while begin < len(ends):
            limit = (ends[begin - 1] if begin else 0) + _BLOCK_ROWS
            end = max(int(ends.searchsorted(limit, side="right")), begin + 1)
            yield begin, end
            begin = end


def _concatenate(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts], dtype=dtype)


class Ledger:
    """The records of a simulation of D bars and M members.

    `totals` are arrays `[D, M]` at the end of each bar, by name: the account, its
    parts in money, and the sums of costs, turnover and lending fees since the start. `opening`,
    `opening_cash [M]` and `opening_amount [M, N]` are those before the first bar. `positions` are
    those at the end of the bars, `orders` come with their fills, and `endings` are the positions in
    instruments whose bars end, with the price at which they were closed, if `closes_endings`.
    """

    def __init__(self, dates: pd.DatetimeIndex, account: Account, *, closes_endings: bool) -> None:
        self.dates = pd.DatetimeIndex(dates.to_numpy(), name="datetime")
        self.closes_endings = closes_endings
        self.opening, self.opening_cash = account.value(), account.cash.copy()
        self.opening_amount = account.amount.copy()
        self._money = np.empty((len(dates), *account.money.shape))
        self._prices = np.empty((len(dates), *account.last_price.shape))
        self.positions = PositionRows(self._prices, self._money)
        self.orders, self.endings = CollectedRows(ORDER), CollectedRows(ENDING)

    def record_bar(self, bar: int, account: Account, orders: Orders, fills: Fills) -> None:
        """Add the state at the end of a bar."""
        self._money[bar], self._prices[bar] = account.money, account.last_price
        self.positions.add_bar(bar, account)
        numbers = (orders.buying, orders.amount, fills.amount, fills.price, fills.value, fills.cost)
        self.orders.append(bar, orders.member, orders.instrument, *numbers)

    @cached_property
    def totals(self) -> dict[str, Floats]:
        totals = {name: self._money[:, k] for k, name in enumerate(MONEY)}
        positions = self.positions
        return totals | {"account": positions.account_value, "value": positions.value}

    @cached_property
    def report_columns(self) -> pd.Index:
        """The columns of Qlib's report."""
        return pd.Index([*self.daily, "bench"])

    @cached_property
    def daily(self) -> dict[str, Floats]:
        """The columns `[D, M]` of Qlib's report, without the benchmark."""
        totals = self.totals
        account = totals["account"]
        previous = np.vstack([self.opening, account[:-1]])
        cost, turnover = (
            np.diff(totals[name], axis=0, prepend=0.0) for name in ("total_cost", "total_turnover")
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "account": account,
                "return": (account - previous + cost) / previous,
                "total_turnover": totals["total_turnover"],
                "turnover": turnover / previous,
                "total_cost": totals["total_cost"],
                "cost": cost / previous,
                "value": totals["value"],
                "cash": totals["cash"],
            }


def simulate(
    exchange: Exchange,
    quotes: Quotes,
    strategy: Strategy,
    scores: Scores | None,
    account: Account,
    *,
    buy_first: bool = False,
    delisting: Delisting = "last_close",
    as_qlib: bool = False,
) -> Ledger:
    """Run a strategy over the bars of `quotes`; updates `account` in place.

    The scores of a bar are traded at the next bar. `scores` cover the dates of the quotes and some
    of their instruments. `buy_first` executes purchases before sales, so that the proceeds of a
    sale cannot pay for a purchase on the same bar. On the bar after the last bar of an instrument,
    before the strategy decides, its positions are closed as `delisting` says: at the last close,
    at zero, or not at all ("keep").
    """
    refuse_old_strategy_names(strategy)
    first = quotes.first
    ledger = Ledger(quotes.dates[first:], account, closes_endings=delisting != "keep")
    bar_scores = None if scores is None else scores.align(quotes.instruments)
    traded_today = np.zeros_like(account.amount)
    days = quotes.dates.normalize()
    is_new_day = np.r_[True, np.asarray(days[1:] != days[:-1])]
    years = np.r_[0.0, np.asarray((quotes.dates[1:] - quotes.dates[:-1]) / _YEAR)]
    end_rows = np.maximum(quotes.end_row, first)
    rows_with_ends = set(end_rows[end_rows < len(quotes.dates)].tolist())
    previous = Market(exchange, quotes, first - 1) if first else None
    for row in range(first, len(quotes.dates)):
        market = Market(exchange, quotes, row)
        if is_new_day[row]:
            traded_today[:] = 0.0
        if exchange.lending_fee:
            account.charge_lending_fee(exchange.lending_fee * years[row])
        if row in rows_with_ends:
            columns = np.flatnonzero(end_rows == row)
            _close_ended_positions(ledger, row - first, account, columns, delisting)
        score = None if bar_scores is None or row == 0 else bar_scores.read(row - 1)
        context = StepContext(
            row - first,
            quotes.instruments,
            score,
            market,
            previous,
            account,
            traded_today=None if as_qlib else traded_today,
            as_qlib=as_qlib,
        )
        orders = strategy.decide(context)
        fills = market.execute(
            orders, account, traded_today, allow_short=strategy.allow_short, buy_first=buy_first
        )
        account.close_bar(market.close)
        ledger.record_bar(row - first, account, orders, fills)
        account.settle()
        previous = market
    _report_ended_positions(ledger, quotes, delisting)
    return ledger


def _close_ended_positions(
    ledger: Ledger, bar: int, account: Account, columns: Indices, delisting: Delisting
) -> None:
    """Close and record the positions in the instruments `columns`, which have no more bars."""
    member, column = np.nonzero(account.amount[:, columns])
    if not len(member):
        return
    instrument = columns[column]
    amount, price = account.amount[member, instrument], account.price[member, instrument]
    if delisting == "zero":
        price = np.zeros_like(price)
    ledger.endings.append(bar, member, instrument, amount, price, amount * price)
    if delisting != "keep":
        account.close_positions(member, instrument, price)


def _report_ended_positions(ledger: Ledger, quotes: Quotes, delisting: Delisting) -> None:
    if not len(ledger.endings):
        return
    ends = dict(zip(ledger.endings.instrument.tolist(), ledger.endings.bar.tolist(), strict=True))
    texts = [f"{quotes.instruments[k]} on {ledger.dates[bar]:%Y-%m-%d}" for k, bar in ends.items()]
    action = {
        "last_close": "were closed at their last close on the day after",
        "zero": "were closed at zero on the day after",
        "keep": "are kept at their last close",
    }[delisting]
    log.warning(
        "%d positions in instruments whose bars end %s: %s%s (delisting=%s).",
        len(ledger.endings),
        action,
        ", ".join(texts[:10]),
        ", ..." if len(texts) > 10 else "",
        delisting,
    )
