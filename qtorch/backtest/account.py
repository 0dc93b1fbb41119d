"""The accounts of a backtest: cash and positions of all members at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtorch.backtest.quotes import Bools, Floats, Places

# What Qlib takes for "all of it" when it sells (numpy's isclose).
RELATIVE, ABSOLUTE = 1e-5, 1e-8


def nearly(given: Floats, held: Floats) -> Bools:
    """Amounts that are the held ones but for rounding."""
    return np.abs(given - held) <= ABSOLUTE + RELATIVE * np.abs(held)


@dataclass
class Account:
    """Cash and holdings of M members over N instruments, moved along bar by bar.

    `cash [M]` may be spent now, `delayed [M]` comes with the end of the bar (settlement by
    cash). `amount [M, N]` adjusted shares, negative when sold short; `price [M, N]` the last
    close, NaN without a position; `count [M, N]` bars held. `cost` and `turnover [M]` are what was
    paid and dealt since the start.
    """

    cash: Floats
    amount: Floats
    price: Floats
    count: NDArray[np.int32]
    settle_cash: bool
    delayed: Floats
    cost: Floats
    turnover: Floats

    @classmethod
    def opened(
        cls, cash: float, amount: Floats, price: Floats, members: int, *, settle_cash: bool
    ) -> Account:
        """M equal accounts with cash and an initial portfolio (`[N]`, zeros for none)."""
        shape = (members, len(amount))
        return cls(
            np.full(members, float(cash)),
            np.broadcast_to(amount, shape).copy(),
            np.broadcast_to(price, shape).copy(),
            np.zeros(shape, dtype=np.int32),
            settle_cash,
            *(np.zeros(members) for _ in range(3)),
        )

    @property
    def held(self) -> Bools:
        """`[M, N]`: there is a position."""
        held: Bools = self.amount != 0
        return held

    def holdings(self) -> Floats:
        """`[M]`: the value of the positions at their last closes."""
        values: Floats = np.where(self.amount != 0, self.amount * self.price, 0.0).sum(axis=1)
        return values

    def value(self) -> Floats:
        """`[M]`: cash and holdings."""
        return self.holdings() + (self.cash + self.delayed)

    def buy(
        self, member: Places, instrument: Places, value: Floats, cost: Floats, price: Floats
    ) -> None:
        """Take dealt purchases in; each (member, instrument) stands once."""
        traded, held = value / price, self.amount[member, instrument]
        left = np.where(nearly(traded, -held), 0.0, held + traded)
        self._move(member, instrument, held, left, price)
        np.subtract.at(self.cash, member, value + cost)  # in order, as the trades came
        # A price that spends the last cent can leave a rounding error below zero.
        self.cash[(self.cash < 0) & (self.cash > -1e-9 * np.abs(self.turnover + 1))] = 0.0
        self._count(member, value, cost)

    def sell(
        self, member: Places, instrument: Places, value: Floats, cost: Floats, price: Floats
    ) -> None:
        """Take dealt sales in; each (member, instrument) stands once."""
        traded, held = value / price, self.amount[member, instrument]
        left = np.where(nearly(traded, held), 0.0, held - traded)
        self._move(member, instrument, held, left, price)
        np.add.at(self.delayed if self.settle_cash else self.cash, member, value - cost)
        self._count(member, value, cost)

    def _move(
        self, member: Places, instrument: Places, held: Floats, left: Floats, price: Floats
    ) -> None:
        self.amount[member, instrument] = left
        gone, fresh = left == 0, held == 0
        self.price[member[fresh], instrument[fresh]] = price[fresh]
        self.price[member[gone], instrument[gone]] = np.nan
        self.count[member[gone], instrument[gone]] = 0

    def _count(self, member: Places, value: Floats, cost: Floats) -> None:
        np.add.at(self.turnover, member, value)
        np.add.at(self.cost, member, cost)

    def close_bar(self, close: Floats) -> None:
        """The bar's end: new closes where there are any (`[N]`, NaN suspended), one bar more."""
        held = self.held
        np.copyto(self.price, close, where=held & ~np.isnan(close))
        self.count += held

    def settle(self) -> None:
        """Delayed cash arrives."""
        self.cash += self.delayed
        self.delayed[:] = 0.0
