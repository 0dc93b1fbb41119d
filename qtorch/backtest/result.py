"""What a backtest found: the account by day, positions, orders, indicators."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from qtorch.backtest.simulate import Ledger
from qtorch.core.errors import ConfigError, unknown_name

REPORT = (
    *("account", "return", "total_turnover", "turnover", "total_cost", "cost"),
    *("value", "cash", "bench"),
)
POSITION = ("amount", "price", "count", "weight")
ORDER = (*("direction", "amount", "deal_amount", "price", "value", "cost"),)


class BacktestResult:
    """The results of one or several members (score columns) over the same days.

    With one member each frame is its own; with several, the columns (positions and orders: the
    first index level) are by member, and `result[name]` is the result of one. Money is in the
    account's unit.
    """

    def __init__(
        self,
        ledger: Ledger,
        members: list[str],
        instruments: pd.Index,
        bench: pd.Series,
        opening: Any,
        freq: str,
        places: list[int] | None = None,
    ) -> None:
        self.members, self.freq = list(members), freq
        self._places = list(range(len(members))) if places is None else places  # in the ledger
        self._ledger, self._instruments, self._bench = ledger, instruments, bench
        self._opening = np.asarray(opening, dtype=np.float64)
        self.dates = pd.DatetimeIndex(ledger.dates, name="datetime")

    def __getitem__(self, member: str) -> BacktestResult:
        return self._one(self._place(member))

    def __iter__(self) -> Iterator[BacktestResult]:
        return (self._one(k) for k in range(len(self.members)))

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def report(self) -> pd.DataFrame:
        """By day: `return` before costs and `cost`, fractions of the account of the day before;
        `turnover` likewise (bought and sold value); `total_cost`, `total_turnover` since the
        start, `account` = `value` of the holdings + `cash`, in money; `bench`, the benchmark's
        return.
        """
        parts = {m: self._report(k) for k, m in zip(self._places, self.members, strict=True)}
        return self._joined(parts, axis=1)

    @cached_property
    def positions(self) -> pd.DataFrame:
        """By (datetime, instrument) at the day's end: `amount` in adjusted shares, `price` the
        last close, `count` bars held, `weight` the share of the account."""
        return self._joined(
            {m: self._positions(k) for k, m in zip(self._places, self.members, strict=True)}, axis=0
        )

    @cached_property
    def orders(self) -> pd.DataFrame:
        """Every order by (datetime, instrument): `direction` buy or sell, `amount` asked for and
        `deal_amount`, `price` (NaN where refused), `value` and `cost` in money."""
        return self._joined(
            {m: self._orders(k) for k, m in zip(self._places, self.members, strict=True)}, axis=0
        )

    @cached_property
    def indicators(self) -> pd.DataFrame:
        """By day: `ffr`, the mean share of the orders' amounts that was dealt; `pa`, the price
        advantage (0: orders are dealt at the bar's one price) and `pos`, the share of orders with
        one; `deal_amount`, `value` and `count` of the orders. NaN on days without orders.
        """
        parts = {m: self._indicators(k) for k, m in zip(self._places, self.members, strict=True)}
        return self._joined(parts, axis=1)

    # -- one member ------------------------------------------------------------------------------

    def _report(self, k: int) -> pd.DataFrame:
        book = self._ledger
        account, cash, value, cost, turnover = (
            np.array([row[k] for row in rows])
            for rows in (book.account, book.cash, book.value, book.cost, book.turnover)
        )
        last = np.r_[self._opening[k], account[:-1]]
        paid, dealt = np.diff(cost, prepend=0.0), np.diff(turnover, prepend=0.0)
        columns = {
            "account": account,
            "return": (account - last + paid) / last,
            "total_turnover": turnover,
            "turnover": dealt / last,
            "total_cost": cost,
            "cost": paid / last,
            "value": value,
            "cash": cash,
            "bench": self._bench.to_numpy(),
        }
        return pd.DataFrame(columns, index=self.dates)[list(REPORT)]

    def _positions(self, k: int) -> pd.DataFrame:
        rows, columns, values = [], [], []
        for row, (member, instrument, *numbers) in enumerate(self._ledger.positions):
            at = np.flatnonzero(member == k)
            rows.append(np.full(len(at), row))
            columns.append(instrument[at])
            values.append(np.stack([n[at] for n in numbers], axis=1))
        frame = pd.DataFrame(
            np.concatenate(values), index=self._index(rows, columns), columns=list(POSITION)
        )
        return frame.astype({"count": "int64"})

    def _orders(self, k: int) -> pd.DataFrame:
        rows, columns, parts = [], [], []
        for row, (orders, fills) in enumerate(self._ledger.orders):
            at = np.flatnonzero(orders.member == k)
            rows.append(np.full(len(at), row))
            columns.append(orders.instrument[at])
            numbers = (orders.amount, fills.amount, fills.price, fills.value, fills.cost)
            parts.append(np.stack([orders.buying, *numbers], axis=1)[at])
        values = np.concatenate(parts)
        frame = pd.DataFrame(
            values[:, 1:], index=self._index(rows, columns), columns=list(ORDER[1:])
        )
        frame.insert(0, ORDER[0], np.where(values[:, 0] > 0, "buy", "sell"))
        return frame

    def _indicators(self, k: int) -> pd.DataFrame:
        orders = self._orders(k)
        asked = orders["amount"].where(orders["amount"] != 0)
        share = (orders["deal_amount"] / asked).groupby(level=0)
        by_day = orders.groupby(level=0)
        frame = pd.DataFrame(
            {
                "ffr": share.mean(),
                "pa": by_day["amount"].size() * 0.0,
                "pos": by_day["amount"].size() * 0.0,
                "deal_amount": by_day["deal_amount"].sum(),
                "value": by_day["value"].sum(),
                "count": by_day["amount"].size().astype(np.float64),
            }
        ).reindex(self.dates)
        return frame.fillna({"deal_amount": 0.0, "value": 0.0, "count": 0.0})

    def _index(self, rows: list[Any], columns: list[Any]) -> pd.MultiIndex:
        return pd.MultiIndex(
            levels=[self.dates, self._instruments],  # type: ignore[list-item]  # stubs: lists only
            codes=[np.concatenate(part) for part in (rows, columns)],  # type: ignore[misc]
            names=["datetime", "instrument"],
        ).remove_unused_levels()

    # -- several ---------------------------------------------------------------------------------

    def _joined(self, parts: dict[str, pd.DataFrame], axis: int) -> pd.DataFrame:
        if len(parts) == 1:
            return next(iter(parts.values()))
        return pd.concat(parts, axis=axis, names=["member"])  # type: ignore[call-overload,no-any-return]

    def _place(self, member: str) -> int:
        if member not in self.members:
            raise ConfigError(unknown_name("member", str(member), self.members))
        return self.members.index(member)

    def _one(self, k: int) -> BacktestResult:
        whole = (self._ledger, [self.members[k]], self._instruments, self._bench, self._opening)
        return BacktestResult(*whole, self.freq, [self._places[k]])
