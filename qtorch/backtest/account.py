"""The accounts of a backtest: cash and positions of all members, kept in arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qtorch.backtest.quotes import Bools, Floats, Indices

_NO_INDICES: Indices = np.zeros(0, dtype=np.intp)
# Qlib treats a sale as a sale of the whole position within these tolerances (numpy's isclose).
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-5, 1e-8


def is_close(amount: Floats, position: Floats) -> Bools:
    """Whether amounts equal the positions up to rounding errors."""
    return np.abs(amount - position) <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(position)


@dataclass
class Account:
    """Cash and positions of M members over N instruments, updated bar by bar.

    `cash [M]` can be spent now; `unsettled_cash [M]` becomes cash at the end of the bar (used only
    with `settle_cash`). `amount [M, N]` are adjusted shares, negative for short positions; `price
    [M, N]` is the last close, NaN without a position; `count [M, N]` is the number of bars that
    the position has been held. `cost`, `turnover` and `lending_fee [M]` are the totals since the
    start; `cost` includes the lending fee.
    """

    cash: Floats
    amount: Floats
    price: Floats
    count: NDArray[np.int32]
    settle_cash: bool
    unsettled_cash: Floats
    cost: Floats
    turnover: Floats
    lending_fee: Floats
    _places: Indices | None = None  # those of `places()`, until a position is opened or closed

    @classmethod
    def create(
        cls, cash: float, amount: Floats, price: Floats, num_members: int, *, settle_cash: bool
    ) -> Account:
        """Create M equal accounts with cash and an initial portfolio (`[N]`, zeros for none)."""
        shape = (num_members, len(amount))
        return cls(
            np.full(num_members, float(cash)),
            np.broadcast_to(amount, shape).copy(),
            np.broadcast_to(price, shape).copy(),
            np.zeros(shape, dtype=np.int32),
            settle_cash,
            np.zeros(num_members),
            np.zeros(num_members),
            np.zeros(num_members),
            np.zeros(num_members),
        )

    @property
    def is_held(self) -> Bools:
        """`[M, N]`: whether the member has a position in the instrument."""
        is_held: Bools = self.amount != 0
        return is_held

    def places(self) -> Indices:
        """The places of all positions in the flattened `[M, N]` arrays, in ascending order."""
        if self._places is None:
            self._places = (self.amount.ravel() != 0).nonzero()[0]
        return self._places

    def count_positions(self) -> Indices:
        """`[M]`: the number of positions."""
        num_members, num_instruments = self.amount.shape
        if num_members == 1:
            return np.array([len(self.places())])
        return np.bincount(self.places() // num_instruments, minlength=num_members)

    def holdings(self) -> Floats:
        """`[M]`: the value of the positions at their last close."""
        places = self.places()
        value = self.amount.ravel()[places] * self.price.ravel()[places]
        return self.sum_by_member(places, value)

    def sum_by_member(self, places: Indices, values: Floats) -> Floats:
        """Sum the values of positions to `[M]`, in the order of the places."""
        num_members, num_instruments = self.amount.shape
        sums: Any = np.bincount(places // num_instruments, values, num_members)
        result: Floats = sums  # weighted counts are float64, which the stubs do not say
        return result

    def value(self) -> Floats:
        """`[M]`: cash (including unsettled cash) plus the value of the positions."""
        return self.holdings() + (self.cash + self.unsettled_cash)

    def buy(
        self, member: Indices, instrument: Indices, value: Floats, cost: Floats, price: Floats
    ) -> None:
        """Book executed purchases; each (member, instrument) pair occurs at most once."""
        self._change_positions(member, instrument, value / price, price)
        np.subtract.at(self.cash, member, value + cost)  # one by one, in the order of the trades
        if self.cash.min() < 0:
            # A purchase that spends all of the cash can leave a rounding error below zero.
            self.cash[(self.cash < 0) & (self.cash > -1e-9 * np.abs(self.turnover + 1))] = 0.0
        self._add_totals(member, value, cost)

    def sell(
        self, member: Indices, instrument: Indices, value: Floats, cost: Floats, price: Floats
    ) -> None:
        """Book executed sales; each (member, instrument) pair occurs at most once."""
        self._change_positions(member, instrument, -value / price, price)
        np.add.at(self.unsettled_cash if self.settle_cash else self.cash, member, value - cost)
        self._add_totals(member, value, cost)

    def close_positions(self, member: Indices, instrument: Indices, price: Floats) -> None:
        """Close positions at a price, without cost or turnover."""
        value = self.amount[member, instrument] * price
        np.add.at(self.unsettled_cash if self.settle_cash else self.cash, member, value)
        self.amount[member, instrument] = 0.0
        self.price[member, instrument] = np.nan
        self.count[member, instrument] = 0
        self._places = None

    def charge_lending_fee(self, rate: float) -> None:
        """Charge a fraction of the value of the short positions at their last close."""
        places = self.places()
        value = self.amount.ravel()[places] * self.price.ravel()[places]
        fee = self.sum_by_member(places, np.maximum(-value, 0.0)) * rate
        self.cash -= fee
        self.cost += fee
        self.lending_fee += fee

    def _change_positions(
        self, member: Indices, instrument: Indices, shares: Floats, price: Floats
    ) -> None:
        """Add shares to positions; a position that is nearly zero afterwards is closed."""
        place = member * self.amount.shape[1] + instrument
        amount = self.amount.reshape(-1)
        position = amount[place]
        new_position = np.where(is_close(-shares, position), 0.0, position + shares)
        amount[place] = new_position
        opened, closed = place[position == 0], place[new_position == 0]
        if len(opened):
            self.price.reshape(-1)[opened] = price[position == 0]
            self._places = None
        if len(closed):
            self.price.reshape(-1)[closed] = np.nan
            self.count.reshape(-1)[closed] = 0
            self._places = None

    def _add_totals(self, member: Indices, value: Floats, cost: Floats) -> None:
        np.add.at(self.turnover, member, value)
        np.add.at(self.cost, member, cost)

    def close_bar(self, close: Floats) -> None:
        """Mark positions to the bar's closes (`[N]`, NaN if suspended) and count one more bar."""
        places = self.places()
        marks = close[places % self.amount.shape[1]]
        has_close = ~np.isnan(marks)
        if has_close.all():
            self.price.reshape(-1)[places] = marks
        else:
            self.price.reshape(-1)[places[has_close]] = marks[has_close]
        self.count.reshape(-1)[places] += 1

    def settle(self) -> None:
        """Make unsettled cash available."""
        if self.settle_cash:
            self.cash += self.unsettled_cash
            self.unsettled_cash[:] = 0.0


@dataclass(frozen=True)
class Orders:
    """K orders of all members; those of one member are executed in this order.

    `member [K]` and `instrument [K]` are indices, `amount [K]` adjusted shares (zero or more),
    `buying [K]` is True for purchases. A member may have at most one purchase and one sale per
    instrument. `head` are the first of these orders, to which `append` added purchases alone.
    """

    member: Indices
    instrument: Indices
    amount: Floats
    buying: Bools
    head: Orders | None = None

    @classmethod
    def empty(cls) -> Self:
        """An empty set of orders."""
        return cls(_NO_INDICES, _NO_INDICES, np.zeros(0), np.zeros(0, dtype=np.bool_))

    @classmethod
    def from_mask(cls, mask: Bools, amount: Floats, *, buying: bool) -> Self:
        """One order for each True of `mask [M, N]`, in column order; `amount [M, N]`."""
        member, instrument = np.nonzero(mask)
        return cls(member, instrument, amount[member, instrument], np.full(len(member), buying))

    def append(self, orders: Orders) -> Self:
        """These orders followed by the other orders."""
        if not len(orders.member):
            return self
        return type(self)(
            np.concatenate((self.member, orders.member)),
            np.concatenate((self.instrument, orders.instrument)),
            np.concatenate((self.amount, orders.amount)),
            np.concatenate((self.buying, orders.buying)),
            self if orders.buying.all() else None,
        )

    def select(self, mask: Bools) -> Self:
        """The orders for which `mask [K]` is True."""
        return type(self)(
            self.member[mask], self.instrument[mask], self.amount[mask], self.buying[mask]
        )


@dataclass(frozen=True)
class Fills:
    """The execution of K orders: traded amount, price (NaN if rejected), value and cost, `[K]`.

    `value` is amount times price in money, before the cost.
    """

    amount: Floats
    price: Floats
    value: Floats
    cost: Floats

    @classmethod
    def empty(cls, count: int) -> Self:
        """The fills of orders that were not executed."""
        price = np.empty(count)
        price.fill(np.nan)
        return cls(np.zeros(count), price, np.zeros(count), np.zeros(count))

    def copy_rows(self, fills: Fills, rows: Indices) -> None:
        """Write these fills to rows of the fills of more orders."""
        fills.amount[rows], fills.price[rows] = self.amount, self.price
        fills.value[rows], fills.cost[rows] = self.value, self.cost
