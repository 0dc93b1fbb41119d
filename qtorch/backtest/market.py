"""One bar of an exchange: what can be traded, at which price, and the execution of orders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, Fills, Orders, is_close
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.quotes import Bools, Floats, Indices, Quotes
from qtorch.core.errors import check_name

Side = Literal["buy", "sell"]
_NO_INDICES: Indices = np.zeros(0, dtype=np.intp)
_MIN_TRADE_VALUE = 1e-5  # in money; a trade of less value is not executed


class Market:
    """The exchange at one bar. Arrays by instrument are `[N]`.

    Everything here is known when the bar's orders are executed, including the bar's own close
    (Qlib's daily backtests execute at the close). A strategy that must not look at the current bar
    uses `StepContext.previous`.
    """

    def __init__(self, exchange: Exchange, quotes: Quotes, row: int) -> None:
        self.exchange, self.quotes, self.row = exchange, quotes, row
        self.close: Floats = quotes.close[row]
        self.volume: Floats = quotes.volume[row]
        self._preview: _Preview | None = None

    @property
    def date(self) -> pd.Timestamp:
        """The date, or the beginning, of the bar."""
        date: pd.Timestamp = self.quotes.dates[self.row]
        return date

    @property
    def is_suspended(self) -> Bools:
        """Whether each instrument has no bar."""
        return np.isnan(self.close)

    def price(self, side: Side) -> Floats:
        """Deal prices `[N]`; the close if an instrument has no deal price."""
        prices = self.quotes.buy_price if side == "buy" else self.quotes.sell_price
        row: Floats = prices[self.row]
        return row

    def field(self, name: str) -> Floats:
        """Values `[N]` of a field or expression listed in the exchange's `subscribe_fields`."""
        check_name("subscribed field", name, self.quotes.fields)
        row: Floats = self.quotes.fields[name][self.row]
        return row

    def is_tradable(self, side: Side | None = None) -> Bools:
        """Whether each instrument is neither suspended nor at the limit of that side.

        With None an instrument must not be at the limit of either side.
        """
        is_tradable: Bools = self.quotes.is_tradable[side][self.row]
        return is_tradable

    def round_lots(self, amount: Floats, instrument: Indices) -> Floats:
        """Round adjusted amounts down to whole trade units; `instrument` has one index each."""
        if self.quotes.factor is None:
            return amount
        unit, factor = self.exchange.trade_unit, self.quotes.factor[self.row][instrument]
        # As in Qlib, 0.1 share is added so that floating-point error does not cost a whole lot.
        lots: Floats = (amount * factor + 0.1) // unit * unit / factor
        return lots

    def execute(
        self,
        orders: Orders,
        account: Account,
        traded_today: Floats,
        *,
        allow_short: bool = False,
        buy_first: bool = False,
    ) -> Fills:
        """Execute orders one after another and book them, sales first unless `buy_first`.

        `traded_today [M, N]` holds the amounts traded so far on this day and is updated. An order
        is rejected if its instrument is suspended or at the limit, or if the cash does not cover
        the cost. Purchases are reduced to the available cash, and sales to the position unless
        `allow_short`.
        """
        if not len(orders.amount):
            return Fills.empty(0)
        if orders.head is not None and orders.tail is not None and not buy_first:
            # All of the purchases are in the tail.
            if self._preview and self._preview.sales is orders.head and not allow_short:
                sold = self._book_preview(self._preview, account)
            else:
                sold = self._execute_side(orders.head, False, account, traded_today, allow_short)
            bought = self._execute_side(orders.tail, True, account, traded_today, allow_short)
            return sold.append(bought)
        sides = [
            self._execute_side(orders, buying, account, traded_today, allow_short)
            for buying in ((True, False) if buy_first else (False, True))
        ]
        bought, sold = sides if buy_first else sides[::-1]
        return bought.combine(orders.buying, sold)

    def preview_sales(
        self,
        sales: Orders,
        account: Account,
        traded_today: Floats | None = None,
        *,
        allow_short: bool = False,
    ) -> Fills:
        """The fills of sales if they were executed now; books nothing.

        The proceeds of a sale pay for the costs of the next even if cash settles later.
        """
        rows = self._tradable_orders(sales, False)
        if not len(rows):
            return Fills.empty(len(sales.amount))
        trades = self._size_trades(
            sales, rows, False, account, traded_today, allow_short=allow_short
        )
        value, cost = self._price_sales(trades, None)
        if len(self._find_cash_limited_orders(trades, value, cost, account.cash)):
            trial = replace(copy.deepcopy(account), settle_cash=False)
            executed = self._book_trades(trades, trial)
        else:
            executed = Fills(value / trades.price, trades.price, value, cost)
            if not (self.quotes.sell_volume or allow_short):
                self._preview = _Preview(sales, rows, trades, executed)
        return executed.spread(rows, len(sales.amount))

    def _book_preview(self, preview: _Preview, account: Account) -> Fills:
        """Book sales whose fills do not depend on what else was traded since they were asked."""
        _book_fills(account.sell, preview.trades, preview.fills)
        return preview.fills.spread(preview.rows, len(preview.sales.amount))

    def _execute_side(
        self,
        orders: Orders,
        buying: bool,
        account: Account,
        traded_today: Floats,
        allow_short: bool,
    ) -> Fills:
        """Execute and book the orders of one side; the others count as not executed."""
        rows = self._tradable_orders(orders, buying)
        if not len(rows):
            return Fills.empty(len(orders.amount))
        trades = self._size_trades(
            orders, rows, buying, account, traded_today, allow_short=allow_short
        )
        executed = self._book_trades(trades, account)
        if self.quotes.buy_volume or self.quotes.sell_volume:
            traded_today[trades.member, trades.instrument] += executed.amount
        return executed.spread(rows, len(orders.amount))

    def _tradable_orders(self, orders: Orders, buying: bool) -> Indices:
        """The rows of the orders of one side whose instruments can be traded."""
        is_tradable = self.is_tradable("buy" if buying else "sell")[orders.instrument]
        mask = is_tradable & orders.buying if buying else is_tradable > orders.buying
        return mask.nonzero()[0]

    def _size_trades(
        self,
        orders: Orders,
        rows: Indices,
        buying: bool,
        account: Account,
        traded_today: Floats | None,
        *,
        allow_short: bool,
    ) -> _Trades:
        """The trades of orders of one side: their amounts within the volume and the position."""
        if len(rows) < len(orders.amount):
            orders = orders.select(rows)
        member, instrument, amount = orders.member, orders.instrument, orders.amount
        prices = self.quotes.buy_price if buying else self.quotes.sell_price
        price = prices[self.row][instrument]
        for limit in self.quotes.buy_volume if buying else self.quotes.sell_volume:
            max_amount = np.nan_to_num(limit.amount[self.row, instrument], nan=0.0)
            if limit.cumulative and traded_today is not None:
                max_amount = max_amount - traded_today[member, instrument]
            amount = np.clip(amount, 0.0, np.maximum(max_amount, 0.0))
        ratio = self._cost_ratio(amount, price, instrument, buying)
        place = member * account.amount.shape[1] + instrument
        if not buying:
            position = account.amount.reshape(-1)[place]
            amount = self._cap_to_position(amount, position, instrument, allow_short)
        return _Trades(member, instrument, place, amount, price, ratio, buying)

    def _book_trades(self, trades: _Trades, account: Account) -> Fills:
        """Book the trades of one side and return their fills.

        They are executed all together unless a member's cash may run short.
        """
        price_trades = self._price_purchases if trades.buying else self._price_sales
        book = account.buy if trades.buying else account.sell
        value, cost = price_trades(trades, None)
        cash_limited = self._find_cash_limited_orders(trades, value, cost, account.cash)
        if not len(cash_limited):
            fills = Fills(value / trades.price, trades.price, value, cost)
            _book_fills(book, trades, fills)
            return fills
        member = trades.member
        round_number = np.zeros(len(member), dtype=np.intp)
        round_number[cash_limited] = _count_earlier_orders(member[cash_limited])
        for number in range(int(round_number.max()) + 1):
            batch = np.flatnonzero(round_number == number)
            cash = np.where(np.isin(batch, cash_limited), account.cash[member[batch]], np.inf)
            selected_trades = trades.select(batch)
            value[batch], cost[batch] = price_trades(selected_trades, cash)
            amount = value[batch] / selected_trades.price
            fills = Fills(amount, selected_trades.price, value[batch], cost[batch])
            _book_fills(book, selected_trades, fills)
        return Fills(value / trades.price, trades.price, value, cost)

    def _find_cash_limited_orders(
        self, trades: _Trades, value: Floats, cost: Floats, cash: Floats
    ) -> Indices:
        """Find the orders of members whose `cash [M]` may not cover all of their orders.

        `value` and `cost` are those with unlimited cash. These orders must be executed one after
        another, in rounds of one order per member.
        """
        if trades.buying:
            order_value = trades.amount * trades.price
            order_cost = self._cost(order_value, trades.ratio)
            need = np.maximum(order_value + order_cost, value + cost)
            member_need = np.bincount(trades.member, need, minlength=len(cash))
        else:
            if np.count_nonzero(value) == len(value) and not np.count_nonzero(cost > value):
                return _NO_INDICES
            shortfall = np.maximum(self._cost(value, trades.ratio) - value, 0.0)
            if not np.count_nonzero(shortfall):
                return _NO_INDICES
            member_need = np.bincount(trades.member, shortfall, minlength=len(cash))
            member_need[member_need == 0] = -np.inf
        is_limited = member_need > cash
        if not np.count_nonzero(is_limited):
            return _NO_INDICES
        return is_limited[trades.member].nonzero()[0]

    def _cap_to_position(
        self, amount: Floats, position: Floats, instrument: Indices, allow_short: bool
    ) -> Floats:
        # A sale of the whole position includes its odd lots, so it is not rounded.
        if np.array_equal(amount, position):
            return amount
        is_whole = is_close(amount, position)
        if is_whole.all():
            return amount
        capped_amount = amount if allow_short else np.minimum(amount, np.maximum(position, 0.0))
        return np.where(is_whole, amount, self.round_lots(capped_amount, instrument))

    def _cost_ratio(
        self, amount: Floats, price: Floats, instrument: Indices, buying: bool
    ) -> Floats | float:
        """The costs of orders as fractions of their value; one number if they are the same."""
        exchange = self.exchange
        rate = exchange.open_cost if buying else exchange.close_cost
        if not exchange.impact_cost:
            return rate
        value = amount * price
        total = self.volume[instrument] * price
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(total > 0, (value / total) ** 2, 1.0)
        return rate + exchange.impact_cost * share

    def _cost(self, value: Floats, ratio: Floats | float) -> Floats:
        cost: Floats = np.maximum(value * ratio, self.exchange.min_cost)
        return cost

    def _price_sales(self, trades: _Trades, cash: Floats | None) -> tuple[Floats, Floats]:
        """Value and cost of sales with `cash [K]` (None: enough); zeros if not executed."""
        value = trades.amount * trades.price
        cost = self._cost(value, trades.ratio)
        is_executed = value > _MIN_TRADE_VALUE
        if cash is not None:
            is_executed &= cash + value >= cost
        return _zero_unless(is_executed, value, cost)

    def _price_purchases(self, trades: _Trades, cash: Floats | None) -> tuple[Floats, Floats]:
        """Value and cost of purchases with `cash [K]` (None: enough); zeros if not executed."""
        amount, price, ratio = trades.amount, trades.price, trades.ratio
        if cash is None:
            value = self.round_lots(amount, trades.instrument) * price
            return _zero_unless(value > _MIN_TRADE_VALUE, value, self._cost(value, ratio))
        order_value = amount * price
        cost = self._cost(order_value, ratio)
        is_short = cash < order_value + cost
        if is_short.any():
            amount = np.where(
                is_short, np.minimum(self._affordable_amount(cash, price, ratio), amount), amount
            )
        amount = self.round_lots(amount, trades.instrument)
        value = amount * price
        final_cost = self._cost(value, ratio)
        too_much = value + final_cost > cash * (1 + 1e-12)
        if self.quotes.factor is not None and too_much.any():
            # Rounding added up to 0.1 share that the cash does not cover: buy one lot less.
            unit = self.exchange.trade_unit / self.quotes.factor[self.row, trades.instrument]
            value = np.where(too_much, np.maximum(amount - unit, 0.0) * price, value)
            final_cost = self._cost(value, ratio)
        is_executed = (cash >= cost) & (value > _MIN_TRADE_VALUE)
        return _zero_unless(is_executed, value, final_cost)

    def _affordable_amount(self, cash: Floats, price: Floats, ratio: Floats | float) -> Floats:
        """The amount whose value plus cost the cash covers exactly."""
        min_cost = self.exchange.min_cost
        with np.errstate(divide="ignore", invalid="ignore"):
            # With at least this much cash the proportional cost exceeds the minimum cost.
            break_even = np.divide(min_cost, ratio) + min_cost if min_cost else 0.0
        max_value = np.where(cash >= break_even, cash / (1 + ratio), cash - min_cost)
        return np.where(cash >= min_cost, max_value, 0.0) / price


@dataclass(frozen=True)
class _Trades:
    """Orders of one side at one bar, `[K]` each: indices, amount, price and cost rate.

    `place` are the indices of the flattened `[M, N]` arrays. `ratio` may be one for all.
    """

    member: Indices
    instrument: Indices
    place: Indices
    amount: Floats
    price: Floats
    ratio: Floats | float
    buying: bool

    def select(self, rows: Indices) -> _Trades:
        return _Trades(
            self.member[rows],
            self.instrument[rows],
            self.place[rows],
            self.amount[rows],
            self.price[rows],
            self.ratio if isinstance(self.ratio, float) else self.ratio[rows],
            self.buying,
        )


class _Preview(NamedTuple):
    """The fills of sales that depend neither on the cash nor on what else is traded."""

    sales: Orders
    rows: Indices
    trades: _Trades
    fills: Fills


def _zero_unless(is_executed: Bools, value: Floats, cost: Floats) -> tuple[Floats, Floats]:
    """The values and the costs, 0 for what is not executed."""
    if np.count_nonzero(is_executed) == len(is_executed):
        return value, cost
    return np.where(is_executed, value, 0.0), np.where(is_executed, cost, 0.0)


def _book_fills(book: Callable[..., None], trades: _Trades, fills: Fills) -> None:
    """Book the trades that were executed: those with a value."""
    member, place, columns = trades.member, trades.place, (fills.amount, fills.value, fills.cost)
    if np.count_nonzero(fills.value) < len(member):
        rows = fills.value.nonzero()[0]
        member, place = member[rows], place[rows]
        columns = (fills.amount[rows], fills.value[rows], fills.cost[rows])
    if len(member):
        book(member, place, *columns)


def _count_earlier_orders(member: Indices) -> Indices:
    """For each order, count the earlier orders of the same member."""
    order = np.argsort(member, kind="stable")
    sorted_member = member[order]
    start = np.r_[0, np.flatnonzero(np.diff(sorted_member)) + 1]
    length = np.diff(np.r_[start, len(sorted_member)])
    count = np.empty(len(member), dtype=np.intp)
    count[order] = np.arange(len(sorted_member)) - np.repeat(start, length)
    return count
