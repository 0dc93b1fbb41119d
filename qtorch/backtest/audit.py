"""The audit of a backtest: its numbers, recomputed from its orders and the bars."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtorch.backtest.exchange import Exchange
from qtorch.backtest.quotes import ZERO_PRICE, Bools, Floats, Indices, Quotes, fill_forward
from qtorch.backtest.simulate import Ledger, Rows
from qtorch.core.errors import AuditError, format_count

log = logging.getLogger(__name__)

# Sums are recomputed in another order: relative to the account, or to the amounts of a day.
TOLERANCE = 1e-9
# Stored prices are float32, and vendors round those that they adjust.
PRICE_TOLERANCE = 1e-3
_MAX_FAULTS = 3  # of each kind in the message


@dataclass(frozen=True)
class Audit:
    """What an audit that found no fault has compared.

    `num_prices` counts the executed orders whose price was compared with the low and the high of
    the bar: none if the source has no such fields. `num_data_faults` counts those of them that were
    executed at the bar's own open or close, although its low and high do not contain that price.
    """

    num_days: int
    num_positions: int
    num_orders: int
    num_prices: int
    num_data_faults: int


class Auditor:
    """Recomputes the numbers of a backtest of all members; `members` are their names."""

    def __init__(
        self, ledger: Ledger, exchange: Exchange, quotes: Quotes, members: Sequence[str]
    ) -> None:
        self.ledger, self.exchange, self.quotes = ledger, exchange, quotes
        self.members = members
        self.orders, self.positions = ledger.orders, ledger.positions
        self.executed = np.flatnonzero(self.orders.column("deal_amount"))
        self.sign = np.where(self.orders.column("buying") > 0, 1.0, -1.0)
        self.low_high_rows: Indices = np.zeros(0, dtype=np.intp)
        self.data_faults: list[str] = []

    def check(self) -> Audit:
        """Return what was compared; raises AuditError with the first faults of each kind.

        Orders at an open or close outside the bar's own low and high are only logged: the bars
        contradict themselves there, not the backtest.
        """
        kinds = {
            "the account is not its cash and its positions": self._account_faults(),
            "the cash does not follow from the orders": self._cash_faults(),
            "turnover and costs are not those of the orders": self._total_faults(),
            "the positions do not follow from the orders": self._amount_faults(),
            "a position is not valued at its last close": self._mark_faults(),
            "the value or the cost of an order is wrong": self._cost_faults(),
            "an order was executed without a bar": self._bar_faults(),
            "a price is outside the low and the high of its bar": self._price_faults(),
        }
        lines = [
            f"{kind}, {format_count(len(faults), 'time')}: {'; '.join(faults[:_MAX_FAULTS])}"
            for kind, faults in kinds.items()
            if faults
        ]
        if lines:
            raise AuditError("\n- ".join(["the audit of the backtest failed:", *lines]))
        if self.data_faults:
            log.warning(
                "%d of %d orders were executed at the open or close of a bar whose own low and "
                "high do not contain it, which is a fault of the data: first %s.",
                len(self.data_faults),
                len(self.low_high_rows),
                self.data_faults[0],
            )
        return Audit(
            len(self.ledger.dates),
            len(self.positions),
            len(self.orders),
            len(self.low_high_rows),
            len(self.data_faults),
        )

    # -- money -----------------------------------------------------------------------------------

    def _account_faults(self) -> list[str]:
        totals, rows = self.ledger.totals, self.positions
        value = self._sum_by_day(rows, rows.column("amount") * rows.column("price"))
        account = totals["cash"] + totals["unsettled"] + value
        faults = self._compare_days("account", totals["account"], account)
        return faults + self._compare_days("value of the positions", totals["value"], value)

    def _cash_faults(self) -> list[str]:
        totals, orders, endings = self.ledger.totals, self.orders, self.ledger.endings
        flow = -self.sign * orders.column("value") - orders.column("cost")
        payments = self._sum_by_day(orders, flow)
        if self.ledger.closes_endings:
            payments += self._sum_by_day(endings, endings.column("value"))
        expected = self.ledger.opening_cash + payments.cumsum(axis=0) - totals["lending_fee"]
        return self._compare_days("cash", totals["cash"] + totals["unsettled"], expected)

    def _total_faults(self) -> list[str]:
        totals, orders = self.ledger.totals, self.orders
        turnover = self._sum_by_day(orders, orders.column("value")).cumsum(axis=0)
        cost = self._sum_by_day(orders, orders.column("cost")).cumsum(axis=0)
        faults = self._compare_days("total turnover", totals["total_turnover"], turnover)
        return faults + self._compare_days(
            "total cost", totals["total_cost"], cost + totals["lending_fee"]
        )

    def _compare_days(self, name: str, value: Floats, expected: Floats) -> list[str]:
        """The days on which values `[D, M]` are not the expected ones."""
        scale = np.abs(self.ledger.totals["account"]) + np.abs(expected) + 1
        is_fault = ~(np.abs(value - expected) <= TOLERANCE * scale)
        return [
            f"{self._place(bar, member)}: {name} {value[bar, member]:.12g}, expected "
            f"{expected[bar, member]:.12g}"
            for bar, member in np.argwhere(is_fault)
        ]

    # -- positions -------------------------------------------------------------------------------

    def _amount_faults(self) -> list[str]:
        """Compare each day's positions with those of the day before and its orders.

        The amounts of a day are compared as one weighted sum over the instruments, whose weights
        are random, so that no two errors cancel each other.
        """
        rows, orders, endings = self.positions, self.orders, self.ledger.endings
        weights = 1 + np.random.default_rng(0).random(len(self.quotes.instruments))
        amount = rows.column("amount") * weights[rows.instrument]
        change = self.sign * orders.column("deal_amount") * weights[orders.instrument]
        position_sum = self._sum_by_day(rows, amount)
        change_sum = self._sum_by_day(orders, change)
        scale = self._sum_by_day(rows, np.abs(amount)) + self._sum_by_day(orders, np.abs(change))
        if self.ledger.closes_endings:
            closed = endings.column("amount") * weights[endings.instrument]
            change_sum -= self._sum_by_day(endings, closed)
            scale += self._sum_by_day(endings, np.abs(closed))
        before = np.vstack([self.ledger.opening_amount @ weights, position_sum[:-1]])
        # A position is closed if an order leaves a rest within the tolerance of `is_close`.
        is_fault = ~(np.abs(position_sum - before - change_sum) <= 2e-5 * scale + 1e-6)
        return [
            f"{self._place(bar, member)}: the amounts are not those of the day before and its "
            "orders"
            for bar, member in np.argwhere(is_fault)
        ]

    def _mark_faults(self) -> list[str]:
        """Compare the prices of the positions with the closes since the first bar."""
        rows, close = self.positions, self.quotes.close[self.quotes.first :]
        price, expected = rows.column("price"), close[rows.bar, rows.instrument]
        suspended = np.flatnonzero(np.isnan(expected))
        if len(suspended):
            instruments, column = np.unique(rows.instrument[suspended], return_inverse=True)
            last = fill_forward(close[:, instruments], np.full(len(instruments), np.nan))
            expected[suspended] = last[rows.bar[suspended], column]
        # An initial position keeps its price until its first close.
        is_fault = (price != expected) & ~np.isnan(expected)
        return self._describe(rows, np.flatnonzero(is_fault), "price {price:.10g}")

    # -- orders ----------------------------------------------------------------------------------

    def _cost_faults(self) -> list[str]:
        orders, rows, exchange = self.orders, self.executed, self.exchange
        columns = (orders.column(name)[rows] for name in orders.names[1:])
        amount, deal_amount, price, value, cost = columns
        rate = np.where(self.sign[rows] > 0, exchange.open_cost, exchange.close_cost)
        is_fault = ~(np.abs(value - deal_amount * price) <= TOLERANCE * value)
        # The impact is that of the order: less may have been dealt, or a tenth of a share more.
        factor = self.quotes.factor
        place = orders.bar[rows] + self.quotes.first, orders.instrument[rows]
        rounded = 0.0 if factor is None else 0.1 / factor[place]
        for traded, side in (
            (np.maximum(np.minimum(amount, deal_amount) - rounded, 0.0), 1),
            (np.maximum(amount, deal_amount), -1),
        ):
            share = self._volume_share(traded, rows) if exchange.impact_cost else 0.0
            limit = np.maximum(value * (rate + exchange.impact_cost * share**2), exchange.min_cost)
            is_fault |= ~(side * (cost - limit) >= -TOLERANCE * (limit + 1))
        text = "{deal_amount:.10g} at {price:.10g}, value {value:.10g}, cost {cost:.10g}"
        return self._describe(orders, rows[is_fault], text)

    def _volume_share(self, amount: Floats, rows: Indices) -> Floats:
        """Amounts of orders as fractions of their bar's volume; 1 without a volume."""
        place = self.orders.bar[rows] + self.quotes.first, self.orders.instrument[rows]
        volume = self.quotes.volume[place]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(volume > 0, amount / volume, 1.0)

    def _bar_faults(self) -> list[str]:
        orders, rows = self.orders, self.executed
        close = self.quotes.close[orders.bar[rows] + self.quotes.first, orders.instrument[rows]]
        is_fault = np.isnan(close) | ~np.isfinite(orders.column("price")[rows])
        return self._describe(orders, rows[is_fault], "{deal_amount:.10g} at {price:.10g}")

    def _price_faults(self) -> list[str]:
        low, high = self.quotes.low, self.quotes.high
        if low is None or high is None:
            return []
        orders, rows = self.orders, self.executed
        place = orders.bar[rows] + self.quotes.first, orders.instrument[rows]
        price, low, high = orders.column("price")[rows], low[place], high[place]
        is_known = (low > ZERO_PRICE) & (high > ZERO_PRICE)
        self.low_high_rows = rows[is_known]
        is_fault = (price < low * (1 - PRICE_TOLERANCE)) | (price > high * (1 + PRICE_TOLERANCE))
        is_outside = is_fault & is_known
        is_own = self._is_own_price(rows, place)
        self.data_faults = self._describe_range(rows, is_outside & is_own, low, high)
        return self._describe_range(rows, is_outside & ~is_own, low, high)

    def _is_own_price(self, rows: Indices, place: tuple[Indices, Indices]) -> Bools:
        """Whether the price of each of the orders is the open or the close of its bar.

        The open is known if it is the price to deal at.
        """
        price, exchange = self.orders.column("price")[rows], self.exchange
        is_own = np.abs(price - self.quotes.close[place]) <= TOLERANCE * price
        for sign, field, deal_price in (
            (1, exchange.buy_field, self.quotes.buy_price),
            (-1, exchange.sell_field, self.quotes.sell_price),
        ):
            if field == "$open":
                is_equal = np.abs(price - deal_price[place]) <= TOLERANCE * price
                is_own |= is_equal & (self.sign[rows] == sign)
        return is_own

    def _describe_range(self, rows: Indices, chosen: Bools, low: Floats, high: Floats) -> list[str]:
        """Describe the chosen ones of the orders with their price and the range of their bar."""
        return [
            f"{text}, low {lowest:.10g}, high {highest:.10g}"
            for text, lowest, highest in zip(
                self._describe(self.orders, rows[chosen], "price {price:.10g}"),
                low[chosen],
                high[chosen],
                strict=True,
            )
        ]

    # -- common ----------------------------------------------------------------------------------

    def _sum_by_day(self, rows: Rows, values: Floats) -> Floats:
        """Sum values of rows by day and member `[D, M]`."""
        shape = self.ledger.totals["account"].shape
        place = rows.bar * shape[1] + rows.member
        sums: Any = np.bincount(place, values, minlength=shape[0] * shape[1])
        result: Floats = sums.reshape(shape)  # float64, which the stubs do not say
        return result

    def _describe(self, rows: Rows, faults: Indices, text: str) -> list[str]:
        """Describe rows, the numbers as `text` says with the columns by their names."""
        return [
            f"{self._place(rows.bar[k], rows.member[k], rows.instrument[k])}: "
            + text.format(**dict(zip(rows.names, rows.values[k].tolist(), strict=True)))
            for k in faults
        ]

    def _place(self, bar: int, member: int, instrument: int | None = None) -> str:
        parts = [f"{self.ledger.dates[bar]:%Y-%m-%d}"]
        if instrument is not None:
            parts.append(str(self.quotes.instruments[instrument]))
        if len(self.members) > 1:
            parts.append(self.members[member])
        return " ".join(parts)
