"""The quotes of a backtest: bars as arrays by day and instrument, and their price moves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qtorch.core.errors import ConfigError

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]

log = logging.getLogger(__name__)

ZERO_PRICE = 1e-8


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

    `first` is the row of the first trading bar: 1, or 0 if there is no earlier bar; more if trading
    begins within a day, whose earlier bars its price limit needs. All arrays are
    `[D, N]`, float64 or bool. `close` is NaN when an instrument does not trade. `buy_price` and
    `sell_price` fall back to the close. `limit_buy` and `limit_sell` are True when an instrument
    cannot be bought or sold. `factor` is None when amounts are not rounded to trade units.
    `fields` are the exchange's `subscribe_fields`. `earlier_close [N]` is the last close before the
    first row, NaN if there is none. `end_row [N]` is the row after the last close of an instrument
    that the source has no later close of, else the number of rows. `low` and `high` are None if the
    source has no such fields.
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
    earlier_close: Floats
    end_row: Indices
    low: Floats | None = None
    high: Floats | None = None
    buy_volume: tuple[VolumeLimit, ...] = ()
    sell_volume: tuple[VolumeLimit, ...] = ()
    fields: Mapping[str, Floats] = field(default_factory=dict)

    @cached_property
    def is_tradable(self) -> Mapping[str | None, Bools]:
        """`[D, N]` by side ("buy", "sell", None: both): neither suspended nor at the limit."""
        buy, sell = ~self.limit_buy, ~self.limit_sell  # the limits of a suspended one are True
        return {"buy": buy, "sell": sell, None: buy & sell}

    @property
    def is_suspended(self) -> Bools:
        """`[D, N]`: whether an instrument has no close, so that it cannot be traded."""
        return np.isnan(self.close)

    def add_instruments(self, instruments: pd.Index) -> Quotes:
        """Add instruments without any bars (always suspended); the result is in sorted order."""
        names = self.instruments.union(instruments)
        column = self.instruments.get_indexer(names)
        exists = column >= 0

        def widen(array: Any, fill: float = np.nan) -> Any:
            return np.where(exists, array[..., column], fill)

        def widen_limits(limits: tuple[VolumeLimit, ...]) -> tuple[VolumeLimit, ...]:
            return tuple(VolumeLimit(widen(limit.amount), limit.cumulative) for limit in limits)

        return Quotes(
            self.dates,
            self.first,
            names,
            close=widen(self.close),
            buy_price=widen(self.buy_price),
            sell_price=widen(self.sell_price),
            volume=widen(self.volume),
            factor=None if self.factor is None else widen(self.factor),
            limit_buy=widen(self.limit_buy, True),
            limit_sell=widen(self.limit_sell, True),
            earlier_close=widen(self.earlier_close),
            end_row=widen(self.end_row, 0).astype(np.intp),
            low=None if self.low is None else widen(self.low),
            high=None if self.high is None else widen(self.high),
            buy_volume=widen_limits(self.buy_volume),
            sell_volume=widen_limits(self.sell_volume),
            fields={name: widen(values) for name, values in self.fields.items()},
        )


def drop_zero_closes(close: Floats, instruments: pd.Index) -> Floats:
    """Replace the closes `[D, N]` that are not above zero by NaN, with a warning."""
    is_zero = close <= ZERO_PRICE
    if is_zero.any():
        names = instruments[np.flatnonzero(is_zero.any(axis=0))]
        log.warning(
            "%d closes are zero or negative and count as missing bars: of %s%s.",
            is_zero.sum(),
            ", ".join(map(str, names[:5])),
            ", ..." if len(names) > 5 else "",
        )
        close[is_zero] = np.nan
    return close


def rows_after_last(values: Floats) -> Indices:
    """For each column of `values [D, N]`, the row after its last value; 0 for none at all."""
    has_value = ~np.isnan(values)
    rows: Indices = np.where(
        has_value.any(axis=0), len(values) - has_value[::-1].argmax(axis=0), 0
    ).astype(np.intp)
    return rows


def fill_forward(values: Floats, first: Floats) -> Floats:
    """Replace each NaN of `values [D, N]` by the last value above it, or else by `first [N]`."""
    if not np.isnan(values).any():
        return values
    rows = np.where(np.isnan(values), -1, np.arange(len(values))[:, None])
    rows = np.maximum.accumulate(rows, axis=0)
    filled: Floats = np.where(rows < 0, first, np.take_along_axis(values, np.maximum(rows, 0), 0))
    return filled


def price_moves(
    price: Floats,
    close: Floats,
    change: Floats | None,
    earlier_close: Floats,
    dates: pd.DatetimeIndex,
) -> Floats:
    """The move of `price [D, N]` from the last close of an earlier day; NaN on a first day.

    An exchange sets its price limits for a day, so bars within a day are all compared with the last
    close of the day before. `change` is the close's own move since the bar before as the source has
    it, which may know of a split that raw prices do not show; where it is NaN the closes themselves
    are compared. `earlier_close [N]` is the last close before the first row, which is the last bar
    of its day unless there is no earlier one.
    """
    moves = _bar_moves(price, close, change, earlier_close)
    days = dates.normalize()
    is_new_day = np.r_[True, np.asarray(days[1:] != days[:-1])]
    if is_new_day.all():
        return moves
    close_moves = moves if price is close else _bar_moves(close, close, change, earlier_close)
    growth = np.where(np.isnan(close), 1.0, 1 + close_moves)
    day_moves = moves.copy()
    for begin, end in pairwise([*np.flatnonzero(is_new_day), len(dates)]):
        since_yesterday = np.cumprod(growth[begin : end - 1], axis=0)
        day_moves[begin + 1 : end] = (1 + moves[begin + 1 : end]) * since_yesterday - 1
    return day_moves


def _bar_moves(
    price: Floats, close: Floats, change: Floats | None, earlier_close: Floats
) -> Floats:
    """The move of `price [D, N]` from the close of the last bar before, over any gap."""
    if change is None:
        by_change = np.full_like(close, np.nan)
    elif price is close:
        by_change = change
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            by_change = np.where(price == close, change, price / close * (1 + change) - 1)
    is_open = np.isnan(by_change) & ~np.isnan(close)
    if not is_open.any():
        return by_change
    before = np.vstack([earlier_close, fill_forward(close, earlier_close)[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        moves: Floats = np.where(is_open, price / before - 1, by_change)
    return moves


def add_extra_quotes(
    quotes: Quotes, frame: pd.DataFrame, fields: tuple[str, str], *, as_qlib: bool
) -> Quotes:
    """Add the instruments of an exchange's `extra_quote`.

    `fields` are the columns of the prices to buy and to sell at; without them it is the close.
    """
    if "$close" not in frame:
        raise ConfigError(f"extra_quote has no column $close, only {list(frame.columns)}.")
    if "instrument" in frame.index.names and frame.index.names[0] != "instrument":
        frame = frame.swaplevel()
    stamps = frame.index.get_level_values(1)
    names = pd.Index(sorted(set(frame.index.get_level_values(0).astype("str"))), dtype="str")
    duplicates = names.intersection(quotes.instruments)
    if len(duplicates):
        raise ConfigError(f"extra_quote contains {list(duplicates[:5])}, also in the source.")
    all_quotes = quotes.add_instruments(names)
    columns = all_quotes.instruments.get_indexer(names)

    def column(name: str, default: Any) -> Any:
        if name not in frame:
            return default
        table = frame[name].unstack(0)
        table.columns = table.columns.astype("str")
        return table.reindex(index=all_quotes.dates, columns=names).to_numpy()

    close = column("$close", None).astype(np.float64)
    all_quotes.end_row[columns] = len(close)
    if not as_qlib:
        close = drop_zero_closes(close, names)
        later = frame["$close"][stamps > all_quotes.dates[-1]].dropna()
        is_later = names.isin(later.index.get_level_values(0).astype("str"))
        all_quotes.end_row[columns] = np.where(is_later, len(close), rows_after_last(close))
    all_quotes.close[:, columns] = close
    for prices, name, default in (
        (all_quotes.buy_price, fields[0], close),
        (all_quotes.sell_price, fields[1], close),
        (all_quotes.volume, "$volume", np.nan),
        (all_quotes.factor, "$factor", 1.0),
        (all_quotes.low, "$low", np.nan),
        (all_quotes.high, "$high", np.nan),
    ):
        if prices is not None:
            prices[:, columns] = column(name, default)
    for name in ("limit_buy", "limit_sell"):
        limits = column(name, False)
        is_limited = np.isnan(close) | pd.isna(limits) | np.equal(limits, True)
        getattr(all_quotes, name)[:, columns] = is_limited
    return all_quotes
