"""Orders and their fills, as arrays over all members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from qtorch.backtest.quotes import Bools, Floats, Indices


@dataclass(frozen=True)
class Orders:
    """K orders of all members; those of one member are executed in this order.

    `member [K]` and `instrument [K]` are indices, `amount [K]` adjusted shares (zero or more),
    `buying [K]` is True for purchases. A member may have at most one purchase and one sale per
    instrument.
    """

    member: Indices
    instrument: Indices
    amount: Floats
    buying: Bools

    @classmethod
    def empty(cls) -> Self:
        """An empty set of orders."""
        empty = np.zeros(0, dtype=np.intp)
        return cls(empty, empty, np.zeros(0), np.zeros(0, dtype=np.bool_))

    @classmethod
    def from_mask(cls, mask: Bools, amount: Floats, *, buying: bool) -> Self:
        """One order for each True of `mask [M, N]`, in column order; `amount [M, N]`."""
        member, instrument = np.nonzero(mask)
        return cls(member, instrument, amount[member, instrument], np.full(len(member), buying))

    @classmethod
    def between(cls, target: Floats, current: Floats, mask: Bools) -> Self:
        """Orders that move the amounts `[M, N]` from `current` to `target` within the mask.

        Sales come first.
        """
        delta = target - current
        return cls.from_mask(mask & (delta < 0), -delta, buying=False).append(
            cls.from_mask(mask & (delta > 0), delta, buying=True)
        )

    def append(self, orders: Orders) -> Self:
        """These orders followed by the other orders."""
        pairs = ((getattr(self, n), getattr(orders, n)) for n in self.__dataclass_fields__)
        return type(self)(*(np.concatenate(pair) for pair in pairs))

    def select(self, mask: Bools) -> Self:
        """The orders for which `mask [K]` is True."""
        return type(self)(*(getattr(self, n)[mask] for n in self.__dataclass_fields__))


@dataclass(frozen=True)
class Fills:
    """The execution of K orders: traded amount, price (NaN if rejected), value and cost, `[K]`.

    `value` is amount times price in money, before the cost.
    """

    amount: Floats
    price: Floats
    value: Floats
    cost: Floats
