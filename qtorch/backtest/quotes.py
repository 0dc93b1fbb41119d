"""What an exchange knows of the bars of a backtest, as dense arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Places: TypeAlias = NDArray[np.intp]

CUMULATIVE, CURRENT = "cum", "current"


@dataclass(frozen=True)
class VolumeLimit:
    """How much of each instrument may be dealt: `amount [D, N]`, NaN nothing.

    `cumulative`: what was dealt earlier on the same day counts against it.
    """

    amount: Floats
    cumulative: bool


@dataclass(frozen=True)
class Quotes:
    """The bars of all instruments on the dates of a backtest and, where there is one, the bar
    before it (`first` is the row at which trading begins: 1, or 0 without such a bar).

    All arrays `[D, N]`, float64. `close` is NaN where an instrument does not trade. `buy_price`
    and `sell_price` are the close where the deal price is missing. `limit_buy`, `limit_sell`: it
    may not be bought, not be sold. `factor` is None where trade units are not rounded to.
    `fields` are those that the exchange was asked to subscribe to.
    """

    dates: pd.DatetimeIndex
    first: int
    instruments: pd.Index
    close: Floats
    buy_price: Floats
    sell_price: Floats
    volume: Floats
    factor: Floats | None
    limit_buy: Bools
    limit_sell: Bools
    buy_volume: tuple[VolumeLimit, ...] = ()
    sell_volume: tuple[VolumeLimit, ...] = ()
    fields: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def suspended(self) -> Bools:
        """`[D, N]`: no close, so nothing is traded."""
        return np.isnan(self.close)

    def widened(self, instruments: pd.Index) -> Quotes:
        """The same with instruments that have no bars, in sorted order."""
        names = self.instruments.union(instruments)
        place = self.instruments.get_indexer(names)
        known = place >= 0

        def wide(array: Floats, fill: float) -> Floats:
            return np.where(known, array[:, place], fill)

        def wide_limits(limits: tuple[VolumeLimit, ...]) -> tuple[VolumeLimit, ...]:
            return tuple(VolumeLimit(wide(x.amount, np.nan), x.cumulative) for x in limits)

        def closed(array: Bools) -> Bools:
            return np.where(known, array[:, place], True)

        return Quotes(
            self.dates,
            self.first,
            names,
            close=wide(self.close, np.nan),
            buy_price=wide(self.buy_price, np.nan),
            sell_price=wide(self.sell_price, np.nan),
            volume=wide(self.volume, np.nan),
            factor=None if self.factor is None else wide(self.factor, np.nan),
            limit_buy=closed(self.limit_buy),
            limit_sell=closed(self.limit_sell),
            buy_volume=wide_limits(self.buy_volume),
            sell_volume=wide_limits(self.sell_volume),
            fields={name: wide(values, np.nan) for name, values in self.fields.items()},
        )
