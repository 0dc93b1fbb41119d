"""Data whose part after a date is changed, to find out what depends on the future."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.identity import digest
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.data.source.base import Bars, Membership, Source

METHODS: tuple[str, ...] = ("scale", "shuffle", "delete")
# A changed price is three times the true one, times a lognormal factor of its own day. A constant
# factor would not be seen by features that are ratios.
LEVEL, SPREAD = 3.0, 0.4
DELISTED_SHARE, MISSING_SHARE = 0.5, 0.3
GAP_DAYS = 3  # the length of a gap before a date
GAP_SHARE, MIN_GAPS = 1 / 8, 3  # the share and the smallest number of instruments with a gap
VOLUME_FIELDS = frozenset(["volume", "amount", "turnover"])


@dataclass(frozen=True)
class FutureChange:
    """What a copy of data has different after an instant, and the gaps that it has before it.

    `after`: values later than this are changed; None changes nothing. `method`: "scale" multiplies
    them by random factors (the same for all prices of an instrument and day, so that open, high,
    low and close stay consistent), "shuffle" permutes each instrument's days, "delete" ends half
    of the instruments and removes days of the others. `gaps`: before each of these dates (itself
    included) an eighth of the instruments lose three days in every copy, so that a fill from
    later values shows. All draws depend only on the seed, the instrument and the calendar.
    """

    after: pd.Timestamp | None = None
    method: str = "scale"
    gaps: tuple[pd.Timestamp, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(unknown_name_message("method to change data", self.method, METHODS))

    def change_source(self, source: Source) -> Source:
        """Return a source of the changed bars."""
        return ChangedSource(source, self)

    def change_view(self, view: View) -> View:
        """Return a view with changed columns and rows, for data that has no source of bars."""
        first = self.first_row(view.calendar)
        is_gap = torch.from_numpy(self.gap_cells(view.calendar, list(view.instruments)))
        rows, history = view.rows.clone(), view.history.clone()
        orders, factors, removals = self._draw_all(
            list(view.instruments), len(view.calendar) - first
        )
        for mask in (rows, history):
            mask[first:] = _shuffle(mask[first:], orders) & ~removals
        groups = dict(view.groups)
        for group, columns in view.groups.items():
            values = columns.block(columns.names)
            for column in values:
                column[first:] = _shuffle(column[first:], orders) * factors[..., 0]
                if group != "label":
                    column[is_gap] = torch.nan
            panel = Panel(
                values.permute(1, 2, 0),
                view.calendar,
                view.instruments,
                columns.names,
                mask=rows,
            )
            groups[group] = PanelColumns(panel)
        return replace(view, groups=groups, rows=rows, history=history)

    # -- draws ---------------------------------------------------------------------------------

    def first_row(self, calendar: pd.DatetimeIndex) -> int:
        """Return the first changed row of a calendar."""
        if self.after is None:
            return len(calendar)
        return int(calendar.searchsorted(self.after, side="right"))

    def factors(self, name: str, num_rows: int) -> np.ndarray:
        """Draw the factors of an instrument's prices and volumes, `[num_rows, 2]` float32."""
        if self.method != "scale":
            return np.ones((num_rows, 2), np.float32)
        draws = self._generator(name).normal(0, SPREAD, (num_rows, 2))
        return (LEVEL * np.exp(draws)).astype(np.float32)

    def day_order(self, name: str, num_rows: int) -> np.ndarray:
        """Draw the row that each changed row of an instrument takes its values from."""
        if self.method != "shuffle":
            return np.arange(num_rows)
        return self._generator(name).permutation(num_rows)

    def missing_days(self, name: str, num_rows: int) -> np.ndarray:
        """Draw which changed rows of an instrument are removed, `[num_rows]` bool."""
        if self.method != "delete":
            return np.zeros(num_rows, bool)
        if self.is_delisted(name):
            return np.ones(num_rows, bool)
        return self._generator(name).random(num_rows) < MISSING_SHARE

    def is_delisted(self, name: str) -> bool:
        """Whether an instrument ends at the instant."""
        return self.method == "delete" and crc32(f"{self.seed} {name}".encode()) % 2 == 0

    def gap_cells(self, calendar: pd.DatetimeIndex, names: Sequence[str]) -> np.ndarray:
        """Return which cells `[D, N]` are gaps; `names` are all instruments of the data."""
        cells = np.zeros((len(calendar), len(names)), bool)
        if not self.gaps:
            return cells
        order = sorted(range(len(names)), key=lambda k: crc32(f"gap {names[k]}".encode()))
        columns = order[: max(MIN_GAPS, int(len(names) * GAP_SHARE))]
        for date in self.gaps:
            stop = int(calendar.searchsorted(date, side="right"))
            cells[max(0, stop - GAP_DAYS) : stop, columns] = True
        return cells

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, METHODS.index(self.method), crc32(name.encode())])

    def _draw_all(self, names: Sequence[str], num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw orders `[R, N]`, factors `[R, N, 2]` and removed cells `[R, N]` of instruments."""
        names = [str(name) for name in names]
        orders = np.stack([self.day_order(n, num_rows) for n in names], 1)
        factors = np.stack([self.factors(n, num_rows) for n in names], 1)
        removals = np.stack([self.missing_days(n, num_rows) for n in names], 1)
        return torch.from_numpy(orders), torch.from_numpy(factors), torch.from_numpy(removals)


class ChangedSource(Source):
    """The bars of another source after a `FutureChange`.

    The calendar stays. "delete" also ends the stored spans and the memberships of the instruments
    that it ends, and removes spans of membership that begin later.
    """

    def __init__(self, source: Source, change: FutureChange) -> None:
        self.source, self.freq = source, source.freq
        self.change = change

    def frequencies(self) -> tuple[str, ...]:
        return self.source.frequencies()

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        return self.source.read_calendar(freq)

    def read_membership(self, universe: str) -> Membership:
        membership = self.source.read_membership(universe)
        after = self.change.after
        if self.change.method != "delete" or after is None:
            return membership
        changed: Membership = {}
        for name, spans in membership.items():
            ends = [
                (first, min(last, after) if self.change.is_delisted(name) else last)
                for first, last in spans
                if first <= after
            ]
            if ends:
                changed[name] = ends
        return changed

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        calendar = self.read_calendar(freq)
        first = self.change.first_row(calendar)
        # A shuffled row takes its values from any later or earlier changed row.
        start = min(rows.start, first)
        stop = len(calendar) if rows.stop > first else rows.stop
        bars = self.source.read_bars(instruments, fields, freq, slice(start, stop))
        values, spans = bars.values.clone(), bars.spans + start
        self._insert_gaps(values, spans, instruments, calendar[start:stop], start)
        if rows.stop > first:
            self._change_values(values[:, first - start :], spans, instruments, fields, first)
            spans = self._end_spans(spans, instruments, first)
        return Bars(values[:, rows.start - start : rows.stop - start], spans - rows.start)

    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        return self.source.fields() if freq is None else self.source.fields(freq)

    def find_fields(self, names: Iterable[str], freq: str | None = None) -> frozenset[str]:
        return self.source.find_fields(names, freq)

    def universes(self) -> tuple[str, ...]:
        return self.source.universes()

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), repr(self.change)])

    def instrument_names(self) -> frozenset[str]:
        return self.source.instrument_names()

    def _drop_missing_instruments(self, names: list[str], freq: str) -> list[str]:
        return self.source._drop_missing_instruments(names, freq)

    # -- changes -------------------------------------------------------------------------------

    @cached_property
    def _all_names(self) -> list[str]:
        return sorted(self.instrument_names())

    def _insert_gaps(
        self,
        values: Tensor,
        spans: Tensor,
        instruments: Sequence[str],
        dates: pd.DatetimeIndex,
        start: int,
    ) -> None:
        """Remove the bars of gaps; the first and last stored bar of an instrument stay."""
        if not self.change.gaps or not len(dates):
            return
        cells = self.change.gap_cells(dates, self._all_names)
        columns = pd.Index(self._all_names).get_indexer(pd.Index(list(instruments)))
        is_gap = torch.from_numpy(cells[:, columns])
        order = torch.arange(start, start + len(dates))[:, None]
        is_gap &= (order > spans[:, 0]) & (order < spans[:, 1])
        values[:, is_gap] = torch.nan

    def _change_values(
        self,
        values: Tensor,
        spans: Tensor,
        instruments: Sequence[str],
        fields: Sequence[str],
        first: int,
    ) -> None:
        """Change `values [F, R, N]` of the rows from `first` to the calendar's end, in place."""
        num_rows = values.shape[1]
        if self.change.method == "shuffle":
            for k, (name, (begin, end)) in enumerate(zip(instruments, spans.tolist(), strict=True)):
                part = slice(max(begin - first, 0), end + 1 - first)
                if part.stop > part.start:
                    order = self.change.day_order(name, part.stop - part.start)
                    values[:, part, k] = values[:, part, k][:, torch.from_numpy(order)]
            return
        _, factors, removals = self.change._draw_all(instruments, num_rows)
        for k, field in enumerate(fields):
            values[k] *= factors[..., int(field in VOLUME_FIELDS)]
        values[:, removals] = torch.nan

    def _end_spans(self, spans: Tensor, instruments: Sequence[str], first: int) -> Tensor:
        is_delisted = torch.tensor([self.change.is_delisted(n) for n in instruments])
        last = torch.where(is_delisted, spans[:, 1].clamp(max=first - 1), spans[:, 1])
        is_empty = last < spans[:, 0]
        return torch.stack([spans[:, 0], last.masked_fill(is_empty, -1)], 1)


def _shuffle(values: Tensor, orders: Tensor) -> Tensor:
    """Reorder the rows of each column of `values [R, N]`."""
    return values.gather(0, orders) if len(values) else values
