"""The market data of a backtest (prices, volumes, limits) as dense arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]

CUMULATIVE, CURRENT = "cum", "current"


@dataclass(frozen=True)
class VolumeLimit:
    """The maximum amount that can be traded: `amount [D, N]`; NaN means nothing can be traded.

    `cumulative`: amounts traded earlier on the same day count towards the limit.
    """

    amount: Floats
    cumulative: bool


@dataclass(frozen=True)
class Quotes:
    """Bars of all instruments on the dates of a backtest, plus the bar before them if there is one.

    `first` is the row of the first trading bar: 1, or 0 if there is no earlier bar. All arrays are
    `[D, N]`, float64 or bool. `close` is NaN when an instrument does not trade. `buy_price` and
    `sell_price` fall back to the close. `limit_buy` and `limit_sell` are True when an instrument
    cannot be bought or sold. `factor` is None when amounts are not rounded to trade units.
    `fields` are the exchange's `subscribe_fields`.
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
    def is_suspended(self) -> Bools:
        """`[D, N]`: whether an instrument has no close, so that it cannot be traded."""
        return np.isnan(self.close)

    def add_instruments(self, instruments: pd.Index) -> Quotes:
        """Add instruments without any bars (always suspended); the result is in sorted order."""
        names = self.instruments.union(instruments)
        column = self.instruments.get_indexer(names)
        exists = column >= 0

        def widen(array: Floats, fill: float) -> Floats:
            return np.where(exists, array[:, column], fill)

        def widen_limits(limits: tuple[VolumeLimit, ...]) -> tuple[VolumeLimit, ...]:
            return tuple(
                VolumeLimit(widen(limit.amount, np.nan), limit.cumulative) for limit in limits
            )

        def widen_mask(array: Bools) -> Bools:
            return np.where(exists, array[:, column], True)

        return Quotes(
            self.dates,
            self.first,
            names,
            close=widen(self.close, np.nan),
            buy_price=widen(self.buy_price, np.nan),
            sell_price=widen(self.sell_price, np.nan),
            volume=widen(self.volume, np.nan),
            factor=None if self.factor is None else widen(self.factor, np.nan),
            limit_buy=widen_mask(self.limit_buy),
            limit_sell=widen_mask(self.limit_sell),
            buy_volume=widen_limits(self.buy_volume),
            sell_volume=widen_limits(self.sell_volume),
            fields={name: widen(values, np.nan) for name, values in self.fields.items()},
        )
