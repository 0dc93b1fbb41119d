"""Questions to an exchange about one instrument and one bar, as Qlib's Exchange answers them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from qtorch.backtest.order import Order, OrderDir
from qtorch.backtest.quotes import Quotes
from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import ConfigError, check_name

METHODS = ("ts_data_last", "last", "sum", "mean", "all")
_TOLERANCE = 1e-5


class QuoteLookup(ABC):
    """Prices, volumes and restrictions of single instruments, and amounts in whole trade units.

    A bar is asked for by its first and last instant, both inclusive; dates may be text. Over
    several bars `method` is "ts_data_last" (the last value that is not missing), "last", "sum",
    "mean", "all" or None (a series by date). Where Qlib has no row, the answer is NaN; for an
    instrument or a date that the exchange does not have, it is None, as in Qlib.

    The bars are those from the exchange's `start_time` to its `end_time`, else those of the
    calendar years that are asked about, and stay in memory. Whole arrays, for a strategy, are those
    of `Market`.
    """

    start_time: pd.Timestamp | None
    end_time: pd.Timestamp | None
    trade_unit: float | None
    buy_field: str
    sell_field: str

    @abstractmethod
    def calendar(self) -> pd.DatetimeIndex:
        """Return all bars of the source in ascending order."""

    @abstractmethod
    def quotes(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes:
        """Return the quotes between two bars, inclusive."""

    # -- prices and volumes ------------------------------------------------------------------------

    def get_quote_info(
        self,
        stock_id: str,
        start_time: Any,
        end_time: Any,
        field: str,
        method: str | None = "ts_data_last",
    ) -> Any:
        """Return a field: $close, $volume, $factor, limit_buy, limit_sell, those of `deal_price`,
        or a field of `subscribe_fields`."""
        start, end = as_stamp(start_time), last_instant(end_time)
        quotes = self._find_quotes(start, end)
        if quotes is None or stock_id not in quotes.instruments:
            return None
        values = _find_field(quotes, field, self.buy_field, self.sell_field)
        rows = slice(*quotes.dates.searchsorted(pd.DatetimeIndex([start, end + _INSTANT])))
        column = values[rows, quotes.instruments.get_loc(stock_id)]
        if not len(column):
            return None
        if method is None and len(column) > 1:
            return pd.Series(column, quotes.dates[rows], name=field)
        return _aggregate(column, method)

    def get_close(
        self, stock_id: str, start_time: Any, end_time: Any, method: str | None = "ts_data_last"
    ) -> Any:
        """Return the close; NaN for an instrument that is suspended."""
        return self.get_quote_info(stock_id, start_time, end_time, "$close", method)

    def get_volume(
        self, stock_id: str, start_time: Any, end_time: Any, method: str | None = "sum"
    ) -> Any:
        """Return the volume, over several bars their sum."""
        return self.get_quote_info(stock_id, start_time, end_time, "$volume", method)

    def get_deal_price(
        self,
        stock_id: str,
        start_time: Any,
        end_time: Any,
        direction: Any,
        method: str | None = "ts_data_last",
    ) -> Any:
        """Return the price at which an order is executed; a missing one is the close."""
        side = "buy_price" if OrderDir.parse(direction) is OrderDir.BUY else "sell_price"
        return self.get_quote_info(stock_id, start_time, end_time, side, method)

    def get_factor(self, stock_id: str, start_time: Any, end_time: Any) -> float | None:
        """Return the adjustment factor; None if amounts are not rounded to trade units."""
        factor: float | None = self.get_quote_info(stock_id, start_time, end_time, "$factor")
        return factor

    # -- restrictions ------------------------------------------------------------------------------

    def check_stock_suspended(self, stock_id: str, start_time: Any, end_time: Any) -> bool:
        """Whether an instrument has no close at all between two dates."""
        close = self.get_close(stock_id, start_time, end_time)
        return close is None or bool(np.isnan(close))

    def check_stock_limit(
        self, stock_id: str, start_time: Any, end_time: Any, direction: Any = None
    ) -> bool:
        """Whether an instrument cannot be bought or sold; None: whether one of the two is not
        possible. Over several bars, whether it is possible on none of them. True if suspended."""
        sides = tuple(OrderDir) if direction is None else (OrderDir.parse(direction),)
        return any(
            bool(
                self.get_quote_info(
                    stock_id, start_time, end_time, f"limit_{side.name.lower()}", "all"
                )
            )
            for side in sides
        )

    def is_stock_tradable(
        self, stock_id: str, start_time: Any, end_time: Any, direction: Any = None
    ) -> bool:
        """Whether an instrument is neither suspended nor at the limit of that side."""
        bar = stock_id, start_time, end_time
        return not (
            self.check_stock_suspended(*bar) or self.check_stock_limit(*bar, direction=direction)
        )

    def check_order(self, order: Order) -> bool:
        """Whether the instrument of an order can be traded in the order's bar."""
        return self.is_stock_tradable(
            order.stock_id, order.start_time, order.end_time, order.direction
        )

    # -- amounts -----------------------------------------------------------------------------------

    def get_amount_of_trade_unit(
        self,
        factor: float | None = None,
        stock_id: str | None = None,
        start_time: Any = None,
        end_time: Any = None,
    ) -> float | None:
        """Return the adjusted shares of one trade unit, by the factor or that of an instrument's
        bar; None if amounts are not rounded."""
        if self.trade_unit is None:
            return None
        factor = self._require_factor(factor, stock_id, start_time, end_time)
        return None if factor is None else self.trade_unit / factor

    def round_amount_by_trade_unit(
        self,
        deal_amount: float,
        factor: float | None = None,
        stock_id: str | None = None,
        start_time: Any = None,
        end_time: Any = None,
    ) -> float:
        """Round adjusted shares down to whole trade units, by the factor or that of a bar."""
        if self.trade_unit is None:
            return deal_amount
        return self._round(
            deal_amount, self._require_factor(factor, stock_id, start_time, end_time)
        )

    def get_real_deal_amount(
        self, current_amount: float, target_amount: float, factor: float | None = None
    ) -> float:
        """Return the rounded amount that leads from a position to a target: negative for a sale.

        A position that is closed is sold as a whole.
        """
        if current_amount < target_amount:
            return self._round(target_amount - current_amount, factor)
        if target_amount == 0 or current_amount == target_amount:
            return target_amount - current_amount
        return -self._round(current_amount - target_amount, factor)

    def calculate_amount_position_value(
        self,
        amount_dict: Mapping[str, float],
        start_time: Any,
        end_time: Any,
        only_tradable: bool = False,
        direction: Any = OrderDir.SELL,
    ) -> float:
        """Return the value of `{instrument: amount}` at the prices of a bar, in money.

        `only_tradable`: of those that can be bought and sold.
        """
        value = 0.0
        for name, amount in amount_dict.items():
            if not only_tradable or self.is_stock_tradable(name, start_time, end_time):
                price = self.get_deal_price(name, start_time, end_time, direction)
                value += (np.nan if price is None else price) * amount
        return value

    def generate_amount_position_from_weight_position(
        self,
        weight_position: Mapping[str, float],
        cash: float,
        start_time: Any,
        end_time: Any,
        direction: Any = OrderDir.BUY,
    ) -> dict[str, float]:
        """Return the amounts that `{instrument: weight}` makes of the cash at the prices of a bar.

        All cash goes to the instruments that can be bought and sold; amounts are whole shares.
        """
        weights = {
            name: weight
            for name, weight in weight_position.items()
            if self.is_stock_tradable(name, start_time, end_time)
        }
        total = sum(weights.values())
        if any(not 0 <= weight <= 1 for weight in weights.values()) or total > 1 + _TOLERANCE:
            raise ConfigError(
                f"the weights of a portfolio must lie between 0 and 1 and not exceed 1 in sum; "
                f"those of the instruments that can be traded are {weights!r:.200}."
            )
        return {
            name: cash
            * weight
            / total
            // self.get_deal_price(name, start_time, end_time, direction)
            for name, weight in weights.items()
            if weight > 0
        }

    def generate_order_for_target_amount_position(
        self,
        target_position: Mapping[str, float],
        current_position: Mapping[str, float],
        start_time: Any,
        end_time: Any,
    ) -> list[Order]:
        """Return the orders that lead from `{instrument: amount}` to a target, sales first.

        Instruments that cannot be both bought and sold are left out. Their order is Qlib's.
        """
        names = sorted({*current_position, *target_position})
        random.Random(0).shuffle(names)
        orders = []
        for name in names:
            if not self.is_stock_tradable(name, start_time, end_time):
                continue
            factor = self.get_factor(name, start_time, end_time)
            amount = self.get_real_deal_amount(
                current_position.get(name, 0), target_position.get(name, 0), factor
            )
            if amount:
                side = OrderDir.BUY if amount > 0 else OrderDir.SELL
                stamps = as_stamp(start_time), as_stamp(end_time)
                orders.append(Order(name, abs(amount), side, *stamps, factor=factor))
        return sorted(orders, key=lambda order: order.direction)

    # -- internals ---------------------------------------------------------------------------------

    def _find_quotes(self, start: pd.Timestamp, end: pd.Timestamp) -> Quotes | None:
        """Return quotes with all bars between two instants; None if there is no bar."""
        calendar = self.calendar()
        first = self.start_time or pd.Timestamp(start.year, 1, 1)
        last = self.end_time or pd.Timestamp(end.year + 1, 1, 1) - _INSTANT
        bars = calendar[calendar.searchsorted(first) : calendar.searchsorted(last + _INSTANT)]
        return self.quotes(bars[0], bars[-1]) if len(bars) else None

    def _require_factor(
        self, factor: float | None, stock_id: str | None, start_time: Any, end_time: Any
    ) -> float | None:
        if factor is not None:
            return factor
        if stock_id is None or start_time is None or end_time is None:
            raise ConfigError(
                "rounding to trade units needs a factor, or stock_id, start_time and end_time."
            )
        return self.get_factor(stock_id, start_time, end_time)

    def _round(self, amount: float, factor: float | None) -> float:
        if self.trade_unit is None or factor is None:
            return amount
        # As in Qlib, 0.1 share is added so that floating-point error does not cost a whole lot.
        return float((amount * factor + 0.1) // self.trade_unit * self.trade_unit / factor)


_INSTANT = pd.Timedelta(nanoseconds=1)


def _find_field(quotes: Quotes, field: str, buy_field: str, sell_field: str) -> Any:
    """Return the array `[D, N]` of a field by Qlib's name."""
    arrays: dict[str, Any] = dict(quotes.fields)
    arrays |= {sell_field: quotes.sell_price, buy_field: quotes.buy_price}
    arrays |= {"$close": quotes.close, "$volume": quotes.volume}
    arrays |= {name: getattr(quotes, name) for name in _ARRAYS}
    if field == "$factor":
        factor = quotes.factor
        return np.full(quotes.close.shape, None) if factor is None else factor
    check_name("field of a quote", field, arrays)
    return arrays[field]


_ARRAYS = ("buy_price", "sell_price", "limit_buy", "limit_sell")


def _aggregate(values: Any, method: str | None) -> Any:
    """Return one value of several bars."""
    if len(values) == 1:
        return values[0]
    check_name("method", str(method), METHODS)
    if method == "all":
        return bool(values.all())
    if method == "last":
        return values[-1]
    present = values[~pd.isna(values)]
    if not len(present):
        return np.nan
    if method == "ts_data_last":
        return present[-1]
    return present.sum() if method == "sum" else present.mean()
