"""One bar of an exchange: what can be traded, at which price, and the execution of orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, Fills, Orders, is_close
from qtorch.backtest.exchange import Bools, Exchange, Floats, Indices, Quotes
from qtorch.core.errors import check_name

Side = Literal["buy", "sell"]
_MIN_TRADE_VALUE = 1e-5  # in money; a trade of less value is not executed


class Market:
    """The exchange at one bar. Arrays by instrument are `[N]`.

    Everything here is known when the bar's orders are executed, including the bar's own close
    (Qlib's daily backtests execute at the close). A strategy that must not look at the current bar
    uses `StepContext.previous`.
    """

    def __init__(self, exchange: Exchange, quotes: Quotes, row: int) -> None:
        self.exchange, self.quotes, self.row = exchange, quotes, row
        self.date: pd.Timestamp = quotes.dates[row]
        self.close: Floats = quotes.close[row]
        self.is_suspended: Bools = np.isnan(self.close)
        self.volume: Floats = quotes.volume[row]

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
        buy, sell = self.quotes.limit_buy[self.row], self.quotes.limit_sell[self.row]
        at_limit = buy | sell if side is None else buy if side == "buy" else sell
        is_tradable: Bools = ~(self.is_suspended | at_limit)
        return is_tradable

    def round_lots(self, amount: Floats, instrument: Indices) -> Floats:
        """Round adjusted amounts down to whole trade units; `instrument` has one index each."""
        if self.quotes.factor is None:
            return amount
        unit, factor = self.exchange.trade_unit, self.quotes.factor[self.row, instrument]
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
        fills = Fills(*(np.zeros(len(orders.amount)) for _ in range(4)))
        fills.price[:] = np.nan
        for buying in (True, False) if buy_first else (False, True):
            is_tradable = self.is_tradable("buy" if buying else "sell")[orders.instrument]
            rows = np.flatnonzero((orders.buying == buying) & is_tradable)
            if len(rows):
                self._execute_side(orders, rows, buying, account, traded_today, fills, allow_short)
        return fills

    def _execute_side(
        self,
        orders: Orders,
        rows: Indices,
        buying: bool,
        account: Account,
        traded_today: Floats,
        fills: Fills,
        allow_short: bool,
    ) -> None:
        """Execute the orders of one side, all together unless a member's cash may run short."""
        member, instrument = orders.member[rows], orders.instrument[rows]
        price = self.price("buy" if buying else "sell")[instrument]
        amount = self._cap_to_volume(orders.amount[rows], member, instrument, buying, traded_today)
        ratio = self._cost_ratio(amount * price, price, instrument, buying)
        if not buying:
            position = account.amount[member, instrument]
            amount = self._cap_to_position(amount, position, instrument, allow_short)
        trades = _Trades(member, instrument, amount, price, ratio)
        price_trades = self._price_purchases if buying else self._price_sales
        book = account.buy if buying else account.sell
        value, cost = price_trades(trades, np.full(len(rows), np.inf))
        cash_limited = self._find_cash_limited_orders(trades, value, cost, account.cash, buying)
        round_number = np.zeros(len(rows), dtype=np.intp)
        round_number[cash_limited] = _count_earlier_orders(member[cash_limited])
        for number in range(int(round_number.max()) + 1):
            batch = np.flatnonzero(round_number == number)
            if len(cash_limited):
                cash = np.where(np.isin(batch, cash_limited), account.cash[member[batch]], np.inf)
                value[batch], cost[batch] = price_trades(trades.select(batch), cash)
            filled = batch[value[batch] > 0]
            book(member[filled], instrument[filled], value[filled], cost[filled], price[filled])
        traded_today[member, instrument] += value / price
        fills.amount[rows], fills.price[rows] = value / price, price
        fills.value[rows], fills.cost[rows] = value, cost

    def _find_cash_limited_orders(
        self, trades: _Trades, value: Floats, cost: Floats, cash: Floats, buying: bool
    ) -> Indices:
        """Find the orders of members whose `cash [M]` may not cover all of their orders.

        `value` and `cost` are those with unlimited cash. These orders must be executed one after
        another, in rounds of one order per member.
        """
        if buying:
            order_value = trades.amount * trades.price
            order_cost = self._cost(order_value, trades.ratio)
            need = np.maximum(order_value + order_cost, value + cost)
            member_need = np.bincount(trades.member, need, minlength=len(cash))
        else:
            shortfall = np.maximum(self._cost(value, trades.ratio) - value, 0.0)
            member_need = np.bincount(trades.member, shortfall, minlength=len(cash))
            member_need[member_need == 0] = -np.inf
        return np.flatnonzero((member_need > cash)[trades.member])

    def _cap_to_volume(
        self,
        amount: Floats,
        member: Indices,
        instrument: Indices,
        buying: bool,
        traded_today: Floats,
    ) -> Floats:
        limits = self.quotes.buy_volume if buying else self.quotes.sell_volume
        for limit in limits:
            max_amount = np.nan_to_num(limit.amount[self.row, instrument], nan=0.0)
            if limit.cumulative:
                max_amount = max_amount - traded_today[member, instrument]
            amount = np.clip(amount, 0.0, np.maximum(max_amount, 0.0))
        return amount

    def _cap_to_position(
        self, amount: Floats, position: Floats, instrument: Indices, allow_short: bool
    ) -> Floats:
        capped_amount = amount if allow_short else np.minimum(amount, np.maximum(position, 0.0))
        # A sale of the whole position includes its odd lots, so it is not rounded.
        return np.where(
            is_close(amount, position), amount, self.round_lots(capped_amount, instrument)
        )

    def _cost_ratio(
        self, value: Floats, price: Floats, instrument: Indices, buying: bool
    ) -> Floats:
        exchange = self.exchange
        rate = exchange.open_cost if buying else exchange.close_cost
        if not exchange.impact_cost:
            return np.full(len(value), rate)
        total = self.volume[instrument] * price
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(total > 0, (value / total) ** 2, 1.0)
        return rate + exchange.impact_cost * share

    def _cost(self, value: Floats, ratio: Floats) -> Floats:
        return np.maximum(value * ratio, self.exchange.min_cost)

    def _price_sales(self, trades: _Trades, cash: Floats) -> tuple[Floats, Floats]:
        """Value and cost of sales with `cash [K]` available; zeros if not executed."""
        value = trades.amount * trades.price
        cost = self._cost(value, trades.ratio)
        is_executed = (cash + value >= cost) & (value > _MIN_TRADE_VALUE)
        return np.where(is_executed, value, 0.0), np.where(is_executed, cost, 0.0)

    def _price_purchases(self, trades: _Trades, cash: Floats) -> tuple[Floats, Floats]:
        """Value and cost of purchases with `cash [K]` available; zeros if not executed."""
        amount, price, ratio = trades.amount, trades.price, trades.ratio
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
        return np.where(is_executed, value, 0.0), np.where(is_executed, final_cost, 0.0)

    def _affordable_amount(self, cash: Floats, price: Floats, ratio: Floats) -> Floats:
        """The amount whose value plus cost the cash covers exactly."""
        min_cost = self.exchange.min_cost
        with np.errstate(divide="ignore", invalid="ignore"):
            # With at least this much cash the proportional cost exceeds the minimum cost.
            break_even = min_cost / ratio + min_cost if min_cost else np.zeros_like(ratio)
        max_value = np.where(cash >= break_even, cash / (1 + ratio), cash - min_cost)
        return np.where(cash >= min_cost, max_value, 0.0) / price


@dataclass(frozen=True)
class _Trades:
    """Orders of one side at one bar, `[K]` each: indices, amount, price and cost rate."""

    member: Indices
    instrument: Indices
    amount: Floats
    price: Floats
    ratio: Floats

    def select(self, rows: Indices) -> _Trades:
        return _Trades(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def _count_earlier_orders(member: Indices) -> Indices:
    """For each order, count the earlier orders of the same member."""
    order = np.argsort(member, kind="stable")
    sorted_member = member[order]
    start = np.r_[0, np.flatnonzero(np.diff(sorted_member)) + 1]
    length = np.diff(np.r_[start, len(sorted_member)])
    count = np.empty(len(member), dtype=np.intp)
    count[order] = np.arange(len(sorted_member)) - np.repeat(start, length)
    return count
