"""Orders, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from qtorch.backtest.quotes import Bools, Floats, Places


@dataclass(frozen=True)
class Orders:
    """K orders of all members, in the order in which each member's are to be dealt.

    `member [K]`, `instrument [K]` places, `amount [K]` adjusted shares (zero or more), `buying
    [K]`. A member gives at most one order to buy and one to sell an instrument.
    """

    member: Places
    instrument: Places
    amount: Floats
    buying: Bools

    @classmethod
    def none(cls) -> Self:
        """No order."""
        empty = np.zeros(0, dtype=np.intp)
        return cls(empty, empty, np.zeros(0), np.zeros(0, dtype=np.bool_))

    @classmethod
    def at(cls, where: Bools, amount: Floats, *, buying: bool) -> Self:
        """One order at each true place of `where [M, N]`, by column; `amount [M, N]`."""
        member, instrument = np.nonzero(where)
        return cls(member, instrument, amount[member, instrument], np.full(len(member), buying))

    @classmethod
    def towards(cls, target: Floats, current: Floats, where: Bools) -> Self:
        """The orders that lead from one set of amounts to another, `[M, N]`, at `where`.

        Sales first.
        """
        delta = target - current
        return cls.at(where & (delta < 0), -delta, buying=False).then(
            cls.at(where & (delta > 0), delta, buying=True)
        )

    def then(self, other: Orders) -> Self:
        """These orders, then the others."""
        pairs = ((getattr(self, n), getattr(other, n)) for n in self.__dataclass_fields__)
        return type(self)(*(np.concatenate(pair) for pair in pairs))

    def only(self, keep: Bools) -> Self:
        """The orders at `keep [K]`."""
        return type(self)(*(getattr(self, n)[keep] for n in self.__dataclass_fields__))


@dataclass(frozen=True)
class Fills:
    """What became of K orders: dealt amount, price (NaN where refused), value and cost, `[K]`.

    `value` is amount times price without the cost, in money.
    """

    amount: Floats
    price: Floats
    value: Floats
    cost: Floats
