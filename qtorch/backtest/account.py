"""The accounts of a backtest: cash and positions of all members, kept in arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qtorch.backtest.quotes import Bools, Floats, Indices

_NO_INDICES: Indices = np.zeros(0, dtype=np.intp)
# Qlib treats a sale as a sale of the whole position within these tolerances (numpy's isclose).
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-5, 1e-8

# The rows of `Account.money`.
MONEY = ("cash", "unsettled", "total_cost", "total_turnover", "lending_fee")


def is_close(amount: Floats, position: Floats) -> Bools:
    """Whether amounts equal the positions up to rounding errors."""
    return np.abs(amount - position) <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(position)


@dataclass
class Account:
    """Cash and positions of M members over N instruments, updated bar by bar.

    `amount [M, N]` are adjusted shares, negative for short positions. `last_price [N]` is the last
    close of each instrument since the start, before it the price of the initial position: all
    members value a position by it. `num_bars` counts the bars that were closed, and `opening_bar
    [M, N]` is what it was when a position was opened. `cash [M]` can be spent now; `unsettled_cash
    [M]` becomes cash at the end of the bar (used only with `settle_cash`). `cost`, `turnover` and
    `lending_fee [M]` are the totals since the start; `cost` includes the lending fee. These five
    are the rows of `money [5, M]`.
    """

    amount: Floats
    last_price: Floats
    opening_bar: NDArray[np.int32]
    settle_cash: bool
    cash: Floats
    unsettled_cash: Floats
    cost: Floats
    turnover: Floats
    lending_fee: Floats
    num_bars: int = 0
    money: Floats = field(init=False)
    _places: Indices | None = None  # those of `places()`, until a position is opened or closed

    def __post_init__(self) -> None:
        parts = (self.cash, self.unsettled_cash, self.cost, self.turnover, self.lending_fee)
        self.money = np.stack(parts)
        self.cash, self.unsettled_cash, self.cost, self.turnover, self.lending_fee = self.money

    @classmethod
    def create(
        cls, cash: float, amount: Floats, price: Floats, num_members: int, *, settle_cash: bool
    ) -> Account:
        """Create M equal accounts with cash and an initial portfolio (`[N]`, zeros for none)."""
        shape = (num_members, len(amount))
        return cls(
            np.broadcast_to(amount, shape).copy(),
            price.copy(),
            np.zeros(shape, dtype=np.int32),
            settle_cash,
            np.full(num_members, float(cash)),
            *np.zeros((len(MONEY) - 1, num_members)),
        )

    @property
    def is_held(self) -> Bools:
        """`[M, N]`: whether the member has a position in the instrument."""
        is_held: Bools = self.amount != 0
        return is_held

    @property
    def price(self) -> Floats:
        """`[M, N]`: the last close, NaN without a position."""
        return np.where(self.is_held, self.last_price, np.nan)

    @property
    def count(self) -> NDArray[np.int32]:
        """`[M, N]`: the number of bars that the position has been held."""
        return np.where(self.is_held, self.num_bars - self.opening_bar, 0).astype(np.int32)

    def count_bars(self, places: Indices) -> NDArray[np.int32]:
        """The number of bars that the positions at places of `[M, N]` have been held."""
        count: NDArray[np.int32] = self.num_bars - self.opening_bar.reshape(-1)[places]
        return count

    def places(self) -> Indices:
        """The places of all positions in the flattened `[M, N]` arrays, in ascending order."""
        if self._places is None:
            self._places = (self.amount.reshape(-1) != 0).nonzero()[0]
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
        return self._sum_by_member(places, self._values(places))

    def _values(self, places: Indices) -> Floats:
        """The values of positions at their last close."""
        values: Floats = self.amount.reshape(-1)[places]
        values *= self.last_price[places % len(self.last_price)]
        return values

    def _sum_by_member(self, places: Indices, values: Floats) -> Floats:
        """Sum the values of positions to `[M]`, in the order of the places."""
        num_members, num_instruments = self.amount.shape
        sums: Any = np.bincount(places // num_instruments, values, num_members)
        result: Floats = sums  # weighted counts are float64, which the stubs do not say
        return result

    def value(self) -> Floats:
        """`[M]`: cash (including unsettled cash) plus the value of the positions."""
        return self.holdings() + (self.cash + self.unsettled_cash)

    def buy(
        self, member: Indices, place: Indices, shares: Floats, value: Floats, cost: Floats
    ) -> None:
        """Book executed purchases at places of `[M, N]`; each place occurs at most once."""
        self._change_positions(place, shares)
        cash = self.cash
        np.subtract.at(cash, member, value + cost)  # one by one, in the order of the trades
        if np.minimum.reduce(cash) < 0:
            # A purchase that spends all of the cash can leave a rounding error below zero.
            cash[(cash < 0) & (cash > -1e-9 * np.abs(self.turnover + 1))] = 0.0
        self._add_totals(member, value, cost)

    def sell(
        self, member: Indices, place: Indices, shares: Floats, value: Floats, cost: Floats
    ) -> None:
        """Book executed sales at places of `[M, N]`; each place occurs at most once."""
        self._change_positions(place, -shares)
        np.add.at(self.unsettled_cash if self.settle_cash else self.cash, member, value - cost)
        self._add_totals(member, value, cost)

    def close_positions(self, member: Indices, instrument: Indices, price: Floats) -> None:
        """Close positions at a price, without cost or turnover."""
        value = self.amount[member, instrument] * price
        np.add.at(self.unsettled_cash if self.settle_cash else self.cash, member, value)
        self.amount[member, instrument] = 0.0
        self._places = None

    def charge_lending_fee(self, rate: float) -> None:
        """Charge a fraction of the value of the short positions at their last close."""
        places = self.places()
        fee = self._sum_by_member(places, np.maximum(-self._values(places), 0.0)) * rate
        self.cash -= fee
        self.cost += fee
        self.lending_fee += fee

    def _change_positions(self, place: Indices, shares: Floats) -> None:
        """Add shares to positions; a position that is nearly zero afterwards is closed."""
        amount = self.amount.reshape(-1)
        position = amount[place]
        rest = position + shares
        is_closed = np.abs(rest) <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(position)
        num_closed = np.count_nonzero(is_closed)
        if num_closed:
            rest[is_closed] = 0.0
            self._places = None
        amount[place] = rest
        if num_closed == len(place):
            return
        is_opened = position == 0
        if np.count_nonzero(is_opened):
            self.opening_bar.reshape(-1)[place[is_opened]] = self.num_bars
            self._places = None

    def _add_totals(self, member: Indices, value: Floats, cost: Floats) -> None:
        np.add.at(self.turnover, member, value)
        np.add.at(self.cost, member, cost)

    def close_bar(self, close: Floats) -> None:
        """Mark positions to the bar's closes (`[N]`, NaN if suspended) and count one more bar."""
        np.copyto(self.last_price, close, where=np.equal(close, close))  # not NaN
        self.num_bars += 1

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
    instrument. `head` and `tail` are the sales, and the purchases that `append` added to them.
    """

    member: Indices
    instrument: Indices
    amount: Floats
    buying: Bools
    head: Orders | None = None
    tail: Orders | None = None

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
        is_split = orders.buying.all() and not self.buying.any()
        return type(self)(
            np.concatenate((self.member, orders.member)),
            np.concatenate((self.instrument, orders.instrument)),
            np.concatenate((self.amount, orders.amount)),
            np.concatenate((self.buying, orders.buying)),
            *((self, orders) if is_split else (None, None)),
        )

    def select(self, mask: Bools | Indices) -> Self:
        """The orders for which `mask [K]` is True, or those of the rows in it."""
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

    def spread(self, rows: Indices, count: int) -> Fills:
        """The fills of `count` orders, of which only `rows` were executed, like this."""
        if len(rows) == count:
            return self
        fills = Fills.empty(count)
        fills.amount[rows], fills.price[rows] = self.amount, self.price
        fills.value[rows], fills.cost[rows] = self.value, self.cost
        return fills

    def append(self, fills: Fills) -> Fills:
        """These fills followed by the other fills."""
        return Fills(
            np.concatenate((self.amount, fills.amount)),
            np.concatenate((self.price, fills.price)),
            np.concatenate((self.value, fills.value)),
            np.concatenate((self.cost, fills.cost)),
        )

    def combine(self, mask: Bools, other: Fills) -> Fills:
        """These fills where `mask [K]` is True, else the other fills."""
        return Fills(
            np.where(mask, self.amount, other.amount),
            np.where(mask, self.price, other.price),
            np.where(mask, self.value, other.value),
            np.where(mask, self.cost, other.cost),
        )
