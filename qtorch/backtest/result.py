"""The result of a backtest: daily report, positions, orders and trade indicators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from qtorch.backtest.audit import Audit, Auditor
from qtorch.backtest.exchange import Exchange
from qtorch.backtest.positions import Positions
from qtorch.backtest.quotes import Quotes
from qtorch.backtest.simulate import Ledger, Rows
from qtorch.core.dates import parse_frequency
from qtorch.core.errors import ConfigError, check_name
from qtorch.core.terminal import html_curves, html_summary

NUM_SHOWN = 3  # members in a notebook's summary


class BacktestResult:
    """Results of one or several members (score columns) over the same days.

    With one member the frames have no member level. With several, the member is the first column
    level (for positions and orders: the first index level), and `result[name]` is the result of
    one member. Money is in the account's currency. `check` audits the numbers.
    """

    def __init__(
        self,
        ledger: Ledger,
        members: list[str],
        exchange: Exchange,
        quotes: Quotes,
        bench: pd.Series,
        all_members: list[str] | None = None,
    ) -> None:
        self.members, self.freq = list(members), exchange.freq
        self.dates = ledger.dates.view()  # a user may rename it
        self._ledger, self._bench = ledger, bench
        self._exchange, self._quotes = exchange, quotes
        self._all_members = all_members or self.members
        self._ledger_columns = [self._all_members.index(member) for member in self.members]

    def __getitem__(self, member: str) -> BacktestResult:
        check_name("member", member, self.members)
        return self._member_result(self.members.index(member))

    def __iter__(self) -> Iterator[BacktestResult]:
        return (self._member_result(k) for k in range(len(self.members)))

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        span = f"{self.dates.min():%Y-%m-%d}..{self.dates.max():%Y-%m-%d}"
        return f"{type(self).__name__}({span}, freq={self.freq!r}, members={self.members})"

    def _repr_html_(self) -> str:
        """Show the sums and curves of the returns in a notebook, for the first members."""
        facts, curves = {}, {}
        for name in self.members[:NUM_SHOWN]:
            report = self[name].report
            net = report["return"] - report["cost"]
            facts[name] = (
                f"return {net.sum():.2%} (sum after costs), cost {report['cost'].sum():.2%}, "
                f"benchmark {report['bench'].sum():.2%}"
            )
            curves[name] = net.cumsum().tolist()
            curves["benchmark"] = report["bench"].fillna(0.0).cumsum().tolist()
        return html_summary(repr(self), facts, html_curves(curves))

    @cached_property
    def report(self) -> pd.DataFrame:
        """Daily report.

        `return` (before costs), `cost` and `turnover` (value bought plus sold) are fractions of the
        previous day's account; `total_cost` and `total_turnover` are sums of money since the start;
        `account` = `value` of the positions + `cash`, in money; `bench` is the benchmark's return.
        """
        return self._join_members(self._report, axis="columns")

    @cached_property
    def positions(self) -> pd.DataFrame:
        """Positions at the end of each day, by (datetime, instrument).

        `amount` in adjusted shares, `price` (the last close), `count` (bars held) and `weight`
        (fraction of the account).
        """
        return self._join_members(self._positions, axis="index")

    @property
    def positions_normal(self) -> Positions:
        """The positions of one member by date, each read as Qlib's Position (with several members:
        `result[name].positions_normal`)."""
        if len(self.members) > 1:
            raise ConfigError(
                f"positions_normal is that of one member: result[{self.members[0]!r}]"
                ".positions_normal."
            )
        return Positions(self.positions, self.report)

    @cached_property
    def orders(self) -> pd.DataFrame:
        """All orders, by (datetime, instrument).

        `direction` (buy or sell), `amount` (ordered), `deal_amount` (executed), `price` (NaN if
        rejected), `value` and `cost` in money.
        """
        return self._join_members(self._orders, axis="index")

    @cached_property
    def indicators(self) -> pd.DataFrame:
        """Daily trade indicators.

        `ffr` is the mean fulfilled fraction of the orders' amounts; `pa` the price advantage
        (always 0, because all orders of a bar are executed at one price); `pos` the share of orders
        with a positive price advantage; then `deal_amount`, `value` and `count` of the orders. The
        ratios are NaN on days without orders.
        """
        return self._join_members(self._indicators, axis="columns")

    @cached_property
    def delistings(self) -> pd.DataFrame:
        """Positions in instruments whose bars end, by (datetime, instrument) of the bar after.

        They were closed for `amount` times `price` = `value`, without cost (with
        `delisting="keep"` they are still held, at that value).
        """
        return self._join_members(self._delistings, axis="index")

    @cached_property
    def lending_fees(self) -> pd.DataFrame | pd.Series:
        """The fees paid for short positions on each bar, in money; `cost` includes them."""
        fees = np.diff(self._ledger.totals["lending_fee"], axis=0, prepend=0.0)
        if len(self.members) == 1:
            return pd.Series(fees[:, self._ledger_columns[0]], self.dates, name="lending_fee")
        return pd.DataFrame(fees[:, self._ledger_columns], self.dates, self.members)

    def check(self) -> Audit:
        """Audit the results of all members, recomputed from the orders and the bars.

        On each day the account is the cash and the positions; cash, positions, turnover and costs
        follow from the orders; each order was executed on a bar that exists, at a price between
        its low and its high. Raises AuditError with the first faults of each kind. Orders at an
        open or close that the bar's own low and high do not contain are a warning.
        """
        return Auditor(self._ledger, self._exchange, self._quotes, self._all_members).check()

    # -- frames of one member --------------------------------------------------------------------

    def _report(self, k: int) -> pd.DataFrame:
        daily = self._ledger.daily
        columns = np.stack([*(values[:, k] for values in daily.values()), self._bench.to_numpy()])
        return pd.DataFrame(columns.T, index=self.dates, columns=self._ledger.report_columns.view())

    def _positions(self, k: int) -> pd.DataFrame:
        return self._frame(self._ledger.positions, k).astype({"count": "int64"})

    def _orders(self, k: int) -> pd.DataFrame:
        frame = self._frame(self._ledger.orders, k)
        direction = np.where(frame.pop("buying") > 0, "buy", "sell")
        frame.insert(0, "direction", direction)
        return frame

    def _delistings(self, k: int) -> pd.DataFrame:
        return self._frame(self._ledger.endings, k)

    def _frame(self, rows: Rows, k: int) -> pd.DataFrame:
        """A member's rows as a frame by (datetime, instrument)."""
        member_rows = rows.of_member(k)
        codes: Any = [rows.bar[member_rows], rows.instrument[member_rows]]
        index = pd.MultiIndex(
            levels=[self.dates, self._quotes.instruments],  # type: ignore[list-item]  # the stubs allow only lists
            codes=codes,
            names=["datetime", "instrument"],
        ).remove_unused_levels()
        return pd.DataFrame(rows.values[member_rows], index=index, columns=list(rows.names))

    def _indicators(self, k: int) -> pd.DataFrame:
        orders = self._orders(k)
        amount = orders["amount"].where(orders["amount"] != 0)
        share = (orders["deal_amount"] / amount).groupby(level=0)
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

    # -- combining and selecting members ---------------------------------------------------------

    def _join_members(
        self, build: Callable[[int], pd.DataFrame], axis: Literal["index", "columns"]
    ) -> pd.DataFrame:
        """Build the frame of each member from its ledger column, and join them."""
        if len(self.members) == 1:
            return build(self._ledger_columns[0])
        parts = dict(zip(self.members, map(build, self._ledger_columns), strict=True))
        frame: pd.DataFrame = pd.concat(parts, axis=axis, names=["member"])
        return frame

    def _member_result(self, k: int) -> BacktestResult:
        common = (self._ledger, [self.members[k]], self._exchange, self._quotes, self._bench)
        return BacktestResult(*common, self._all_members)


_PANDAS_UNITS = {"min": "min", "day": "D", "week": "W", "month": "M"}


def period_name(freq: str) -> str:
    """Normalise a frequency to the form used in artifact and metric names: "1day", "5min"."""
    count, unit = parse_frequency(str(freq))
    return f"{count}{unit}"


def resample_report(report: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Aggregate a report to longer periods, as if each period were one bar.

    Money columns are those of the period's last bar; returns, costs and turnover are fractions of
    the account before the period's first bar; the benchmark's return is compounded. Each row is
    labelled with the first bar of its period.
    """
    first, last = _period_edges(report.index, freq)
    rows = report.iloc[last].set_index(report.index[first])
    opening = report["account"].iloc[0] / (1 + report["return"].iloc[0] - report["cost"].iloc[0])
    opening_account = np.r_[opening, rows["account"].to_numpy()[:-1]]
    for name in ("cost", "turnover"):
        amount = np.diff(rows[f"total_{name}"].to_numpy(), prepend=0.0)
        rows[name] = amount / opening_account
    rows["return"] = rows["account"].to_numpy() / opening_account - 1 + rows["cost"].to_numpy()
    growth = (1 + report["bench"]).groupby(_period_numbers(first, len(report))).prod(min_count=1)
    rows["bench"] = growth.to_numpy() - 1
    return rows


def resample_indicators(indicators: pd.DataFrame, freq: str) -> pd.DataFrame:
    """Aggregate trade indicators to longer periods.

    Amounts, values and counts are summed; the ratios are averaged, weighted by the number of
    orders.
    """
    first, _ = _period_edges(indicators.index, freq)
    period = _period_numbers(first, len(indicators))
    sums = indicators[["deal_amount", "value", "count"]].groupby(period).sum()
    means = indicators[["ffr", "pa", "pos"]].mul(indicators["count"], axis=0)
    means = means.groupby(period).sum().div(sums["count"].where(sums["count"] > 0), axis=0)
    return pd.concat([means, sums], axis=1).set_axis(indicators.index[first])


def _period_edges(dates: pd.Index, freq: str) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers of the first and the last bar of each period."""
    count, unit = parse_frequency(freq)
    index = pd.DatetimeIndex(dates)
    period = np.asarray(index.to_period(_PANDAS_UNITS[unit]).astype("int64"))
    period = (period - period[0]) // count
    change = np.flatnonzero(np.diff(period)) + 1
    return np.r_[0, change], np.r_[change - 1, len(index) - 1]


def _period_numbers(first: np.ndarray, count: int) -> np.ndarray:
    """The period number of each row."""
    return np.searchsorted(first, np.arange(count), side="right") - 1
