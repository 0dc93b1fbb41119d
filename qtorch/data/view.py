"""A view: groups of columns and the rows that count, as a handler's raw, infer or learn data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError, unknown_name
from qtorch.data.columns import Columns
from qtorch.data.panel import NAMES


@dataclass(frozen=True)
class View:
    """Groups of columns ("feature", "label", ...) over one calendar and instruments.

    `rows [D, N]` bool are the samples, after the processors that drop rows; `history [D, N]`
    bool are the rows that a window may look back at, before any were dropped (Qlib blanks
    dropped rows inside windows too; here DropnaLabel takes a sample away, not a day of the
    past). A view is not changed: `with_group` and `with_rows` give another one that shares
    storage.
    """

    groups: Mapping[str, Columns]
    rows: Tensor
    history: Tensor
    _order: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.groups:
            raise DataError("a view needs at least one group of columns.")
        expected = (len(self.calendar), len(self.instruments))
        for what, mask in (("rows", self.rows), ("history", self.history)):
            if tuple(mask.shape) != expected or mask.dtype != torch.bool:
                raise DataError(
                    f"{what} must be bool of shape {expected} (dates, instruments), got "
                    f"{mask.dtype} {tuple(mask.shape)}."
                )
        for name, columns in self.groups.items():
            if columns.shape[:2] != expected:
                raise DataError(
                    f"group {name!r} has shape {columns.shape[:2]} (dates, instruments), "
                    f"the view {expected}."
                )

    @property
    def calendar(self) -> pd.DatetimeIndex:
        """The dates of the rows."""
        return next(iter(self.groups.values())).calendar

    @property
    def instruments(self) -> pd.Index:
        """The instruments of the columns."""
        return next(iter(self.groups.values())).instruments

    def group(self, name: str) -> Columns:
        """One group's columns; a DataError with the nearest name where there is none."""
        try:
            return self.groups[name]
        except KeyError:
            raise DataError(unknown_name("group of columns", name, self.groups)) from None

    def with_group(self, name: str, columns: Columns) -> View:
        """A view with one group replaced or added."""
        return replace(self, groups={**self.groups, name: columns})

    def with_rows(self, rows: Tensor) -> View:
        """A view with other sample rows; what windows may see stays."""
        return replace(self, rows=rows)

    # -- rows ----------------------------------------------------------------------------------

    def date_rows(self, start: Any = None, end: Any = None) -> slice:
        """The calendar rows of the inclusive span `start..end` (None is open)."""
        return date_rows(self.calendar, start, end)

    def sample_rows(
        self, rows: slice = slice(None), mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(date row, instrument column), int64 `[S]` each, in (datetime, instrument) order.

        Instruments are ordered by name. `mask [D, N]` narrows the view's rows further.
        """
        first = rows.indices(len(self.calendar))[0]
        chosen = self.rows[rows] if mask is None else self.rows[rows] & mask[rows]
        order = np.argsort(self.instruments.to_numpy(dtype=object), kind="stable")
        if bool((order == np.arange(len(order))).all()):
            date, instrument = torch.nonzero(chosen, as_tuple=True)
            return date + first, instrument
        by_name = torch.as_tensor(order, device=chosen.device)
        date, place = torch.nonzero(chosen[:, by_name], as_tuple=True)
        return date + first, by_name[place]

    def index(self, date: Tensor, instrument: Tensor) -> pd.MultiIndex:
        """The `(datetime, instrument)` index of pairs of rows and columns."""
        return multi_index(self.calendar, self.instruments, date, instrument)

    # -- frames --------------------------------------------------------------------------------

    def frame(
        self,
        *,
        start: Any = None,
        end: Any = None,
        groups: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The sample rows as a frame: `(datetime, instrument)` by `(group, name)`, float32.

        This is the one thing that costs a full frame of memory.
        """
        span = self.date_rows(start, end)
        date, instrument = self.sample_rows(span)
        chosen = list(self.groups) if groups is None else list(groups)
        pairs = [(g, name) for g in chosen for name in self.group(g).names]
        data = np.empty((len(pairs), len(date)), dtype=np.float32)
        done = 0
        for g in chosen:
            columns = self.group(g)
            for first in range(0, len(columns.names), 16):
                part = columns.names[first : first + 16]
                taken = columns.block(part, rows=span)[:, date - span.start, instrument]
                data[done : done + len(part)] = taken.cpu().numpy()
                done += len(part)
        return pd.DataFrame(
            data.T,
            index=self.index(date, instrument),
            columns=pd.MultiIndex.from_tuples(pairs)
            if pairs
            else pd.MultiIndex.from_arrays([[], []]),
            copy=False,
        )


def multi_index(
    calendar: pd.DatetimeIndex, instruments: pd.Index, date: Tensor, instrument: Tensor
) -> pd.MultiIndex:
    """The `(datetime, instrument)` index of pairs of calendar rows and instrument columns."""
    levels: list[Any] = [calendar, instruments]
    codes: list[Any] = [date.cpu().numpy(), instrument.cpu().numpy()]
    index = pd.MultiIndex(levels=levels, codes=codes, names=list(NAMES), verify_integrity=False)
    return index.remove_unused_levels()
