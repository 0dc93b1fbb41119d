"""One bar of an exchange: what may be traded, at which price, and the dealing of orders."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from qtorch.backtest.account import Account, nearly
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.orders import Fills, Orders
from qtorch.backtest.quotes import Bools, Floats, Places, Quotes
from qtorch.core.errors import ConfigError, unknown_name

Side = Literal["buy", "sell"]
_NOTHING = 1e-5  # money; a smaller trade is none


class Market:
    """The exchange at one bar. Arrays by instrument are `[N]`.

    What it shows is known when the bar's orders are dealt, the bar's own close included (that is
    when Qlib's daily backtests deal); a strategy that must not see so much uses `before`.
    """

    def __init__(self, exchange: Exchange, quotes: Quotes, row: int) -> None:
        self.exchange, self.quotes, self.row = exchange, quotes, row
        self.date: pd.Timestamp = quotes.dates[row]
        self.close: Floats = quotes.close[row]
        self.suspended: Bools = np.isnan(self.close)
        self.volume: Floats = quotes.volume[row]

    def price(self, side: Side) -> Floats:
        """Deal prices; the close where there is none."""
        prices = self.quotes.buy_price if side == "buy" else self.quotes.sell_price
        row: Floats = prices[self.row]
        return row

    def field(self, name: str) -> Floats:
        """What `subscribe_fields` asked for, by the name given there."""
        if name not in self.quotes.fields:
            raise ConfigError(unknown_name("subscribed field", name, self.quotes.fields))
        row: Floats = self.quotes.fields[name][self.row]
        return row

    def tradable(self, side: Side | None = None) -> Bools:
        """Neither suspended nor at the limit of that side (None: of either side)."""
        buy, sell = self.quotes.limit_buy[self.row], self.quotes.limit_sell[self.row]
        limited = buy | sell if side is None else buy if side == "buy" else sell
        open_: Bools = ~(self.suspended | limited)
        return open_

    def rounded(self, amount: Floats, instrument: Places) -> Floats:
        """Adjusted amounts down to whole trade units; `instrument` gives each one's place."""
        if self.quotes.factor is None:
            return amount
        unit, factor = self.exchange.trade_unit, self.quotes.factor[self.row, instrument]
        # 0.1 of a share against amounts that are whole but for rounding, as in Qlib.
        units: Floats = (amount * factor + 0.1) // unit * unit / factor
        return units

    def deal(
        self,
        orders: Orders,
        account: Account,
        dealt: Floats,
        *,
        short: bool = False,
        buy_first: bool = False,
    ) -> Fills:
        """Deal orders one after another and book them, sales first unless `buy_first`.

        `dealt [M, N]` is what was dealt that day so far, and grows.
        Refused: suspended, at the limit, or a cost that the cash does not cover. Purchases are
        cut to the cash, sales to the position unless `short`.
        """
        fills = Fills(*(np.zeros(len(orders.amount)) for _ in range(4)))
        fills.price[:] = np.nan
        for buying in (True, False) if buy_first else (False, True):
            open_ = self.tradable("buy" if buying else "sell")[orders.instrument]
            side = np.flatnonzero((orders.buying == buying) & open_)
            if len(side):
                self._deal_side(orders, side, buying, account, dealt, fills, short)
        return fills

    def _deal_side(
        self,
        orders: Orders,
        at: Places,
        buying: bool,
        account: Account,
        dealt: Floats,
        fills: Fills,
        short: bool,
    ) -> None:
        """Deal the orders of one side, at once where no member's cash can run short."""
        member, instrument = orders.member[at], orders.instrument[at]
        price = self.price("buy" if buying else "sell")[instrument]
        amount = self._within_volume(orders.amount[at], member, instrument, buying, dealt)
        ratio = self._cost_ratio(amount * price, price, instrument, buying)
        step = self._bought if buying else self._sold
        rich = np.full(len(at), np.inf)
        if not buying:
            held = account.amount[member, instrument]
            amount = self._within_position(amount, held, instrument, short)
        value, cost = step(amount, rich, price, ratio, instrument)
        poor = self._poor(account, member, value, cost, amount, price, ratio, buying)
        book = account.buy if buying else account.sell
        if len(poor):
            rounds = np.zeros(len(at), dtype=np.intp)
            rounds[poor] = _turn(member[poor])
            turns = [np.flatnonzero(rounds == turn) for turn in range(int(rounds.max()) + 1)]
        else:
            turns = [np.arange(len(at))]
        for now in turns:
            if len(poor):
                cash = np.where(np.isin(now, poor), account.cash[member[now]], np.inf)
                value[now], cost[now] = step(
                    amount[now], cash, price[now], ratio[now], instrument[now]
                )
            done = now[value[now] > 0]
            book(member[done], instrument[done], value[done], cost[done], price[done])
        dealt[member, instrument] += value / price
        fills.amount[at], fills.price[at] = value / price, price
        fills.value[at], fills.cost[at] = value, cost

    def _poor(
        self,
        account: Account,
        member: Places,
        value: Floats,
        cost: Floats,
        amount: Floats,
        price: Floats,
        ratio: Floats,
        buying: bool,
    ) -> Places:
        """The orders of the members whose cash might not do for all of theirs."""
        if buying:
            asked = amount * price
            need = np.maximum(asked + self._cost(asked, ratio), value + cost)
            needed = np.bincount(member, need, minlength=len(account.cash))
        else:
            short_of = np.maximum(self._cost(value, ratio) - value, 0.0)
            needed = np.bincount(member, short_of, minlength=len(account.cash))
            needed[needed == 0] = -np.inf
        return np.flatnonzero((needed > account.cash)[member])

    def _within_volume(
        self, amount: Floats, member: Places, instrument: Places, buying: bool, dealt: Floats
    ) -> Floats:
        limits = self.quotes.buy_volume if buying else self.quotes.sell_volume
        for limit in limits:
            most = np.nan_to_num(limit.amount[self.row, instrument], nan=0.0)
            if limit.cumulative:
                most = most - dealt[member, instrument]
            amount = np.clip(amount, 0.0, np.maximum(most, 0.0))
        return amount

    def _within_position(
        self, amount: Floats, held: Floats, instrument: Places, short: bool
    ) -> Floats:
        part = amount if short else np.minimum(amount, np.maximum(held, 0.0))
        # A whole position goes as it is, odd lots and all.
        return np.where(nearly(amount, held), amount, self.rounded(part, instrument))

    def _cost_ratio(self, value: Floats, price: Floats, instrument: Places, buying: bool) -> Floats:
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

    def _sold(
        self, amount: Floats, cash: Floats, price: Floats, ratio: Floats, instrument: Places
    ) -> tuple[Floats, Floats]:
        """Value and cost of sales of `amount` with `cash` in hand."""
        value = amount * price
        cost = self._cost(value, ratio)
        done = (cash + value >= cost) & (value > _NOTHING)
        return np.where(done, value, 0.0), np.where(done, cost, 0.0)

    def _bought(
        self, amount: Floats, cash: Floats, price: Floats, ratio: Floats, instrument: Places
    ) -> tuple[Floats, Floats]:
        """Value and cost of purchases of up to `amount` with `cash` in hand."""
        asked = amount * price
        cost = self._cost(asked, ratio)
        short = cash < asked + cost
        if short.any():
            amount = np.where(
                short, np.minimum(self._affordable(cash, price, ratio), amount), amount
            )
        amount = self.rounded(amount, instrument)
        value = amount * price
        paid = self._cost(value, ratio)
        over = value + paid > cash * (1 + 1e-12)
        if self.quotes.factor is not None and over.any():
            # The 0.1 of a share in the rounding, which the cash does not hold: a unit less.
            unit = self.exchange.trade_unit / self.quotes.factor[self.row, instrument]
            value = np.where(over, np.maximum(amount - unit, 0.0) * price, value)
            paid = self._cost(value, ratio)
        done = (cash >= cost) & (value > _NOTHING)
        return np.where(done, value, 0.0), np.where(done, paid, 0.0)

    def _affordable(self, cash: Floats, price: Floats, ratio: Floats) -> Floats:
        """The amount whose value and cost the cash covers."""
        least = self.exchange.min_cost
        with np.errstate(divide="ignore", invalid="ignore"):
            # From this much cash on, the cost is a share of the value and not the minimum.
            turning = least / ratio + least if least else np.zeros_like(ratio)
        rich = np.where(cash >= turning, cash / (1 + ratio), cash - least)
        return np.where(cash >= least, rich, 0.0) / price


def _turn(member: Places) -> Places:
    """For each order the number of earlier ones of its member."""
    order = np.argsort(member, kind="stable")
    ordered = member[order]
    start = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
    length = np.diff(np.r_[start, len(ordered)])
    turn = np.empty(len(member), dtype=np.intp)
    turn[order] = np.arange(len(ordered)) - np.repeat(start, length)
    return turn
