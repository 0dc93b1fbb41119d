"""A view: groups of columns and the valid rows, as a handler's raw, infer or learn data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError, unknown_name_message
from qtorch.data.panel.columns import Columns, PanelColumns, column_parts
from qtorch.data.panel.panel import Panel, coverage_dates, multi_index

FLAT = ""  # the name of the only group if the columns have no groups
HOW = ("outer", "inner", "left", "right")  # the ways to join the rows of views


@dataclass(frozen=True)
class View:
    """Groups of columns ("feature", "label", ...) over one calendar and instruments.

    `rows [D, N]` bool are the samples, after the processors that drop rows. `history [D, N]` bool
    are the rows that a window may look back at, before any were dropped. (Qlib also blanks dropped
    rows inside windows; here DropnaLabel removes a sample, not a day of the past.) A view is
    immutable: `with_group` and `with_rows` return another one that shares storage.
    """

    groups: Mapping[str, Columns]
    rows: Tensor
    history: Tensor

    def __post_init__(self) -> None:
        if not self.groups:
            raise DataError("a view needs at least one group of columns.")
        expected_shape = (len(self.calendar), len(self.instruments))
        for mask_name, mask in (("rows", self.rows), ("history", self.history)):
            if tuple(mask.shape) != expected_shape or mask.dtype != torch.bool:
                raise DataError(
                    f"{mask_name} must be bool of shape {expected_shape} (dates, instruments), got "
                    f"{mask.dtype} {tuple(mask.shape)}."
                )
        for name, columns in self.groups.items():
            if columns.shape[:2] != expected_shape:
                raise DataError(
                    f"group {name!r} has shape {columns.shape[:2]} (dates, instruments), "
                    f"the view {expected_shape}."
                )

    @property
    def calendar(self) -> pd.DatetimeIndex:
        """The dates of the rows."""
        return next(iter(self.groups.values())).calendar

    @property
    def dates(self) -> pd.DatetimeIndex:
        """The dates on which any instrument has a row."""
        return self.calendar[self.rows.any(1).cpu().numpy()]

    @property
    def instruments(self) -> pd.Index:
        """The instruments of the columns."""
        return next(iter(self.groups.values())).instruments

    @property
    def is_flat(self) -> bool:
        """Whether the columns have no groups."""
        return set(self.groups) == {FLAT}

    def group(self, name: str) -> Columns:
        """Return one group's columns; raise DataError with the nearest name if it is unknown."""
        try:
            return self.groups[name]
        except KeyError:
            raise DataError(unknown_name_message("group of columns", name, self.groups)) from None

    def with_group(self, name: str, columns: Columns) -> View:
        """Return a view with one group replaced or added."""
        return replace(self, groups={**self.groups, name: columns})

    def with_rows(self, rows: Tensor) -> View:
        """Return a view with other sample rows; the history of windows stays."""
        return replace(self, rows=rows)

    # -- rows ----------------------------------------------------------------------------------

    def date_rows(self, start: Any = None, end: Any = None) -> slice:
        """Return the calendar rows of the inclusive span `start..end` (None is open)."""
        return date_rows(self.calendar, start, end)

    def sample_rows(
        self, rows: slice = slice(None), mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (date row, instrument column), int64 `[S]` each, in (datetime, instrument) order.

        Instruments are ordered by name. `mask [D, N]` restricts the view's rows further.
        """
        first = rows.indices(len(self.calendar))[0]
        is_sample = self.rows[rows] if mask is None else self.rows[rows] & mask[rows]
        order = np.argsort(self.instruments.to_numpy(dtype=object), kind="stable")
        if bool((order == np.arange(len(order))).all()):
            date, instrument = torch.nonzero(is_sample, as_tuple=True)
            return date + first, instrument
        by_name = torch.as_tensor(order, device=is_sample.device)
        date, name_rank = torch.nonzero(is_sample[:, by_name], as_tuple=True)
        return date + first, by_name[name_rank]

    def index(self, date: Tensor, instrument: Tensor) -> pd.MultiIndex:
        """Return the `(datetime, instrument)` index of row and column pairs."""
        return multi_index(self.calendar, self.instruments, date, instrument)

    # -- frames --------------------------------------------------------------------------------

    def frame(
        self,
        *,
        start: Any = None,
        end: Any = None,
        groups: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the sample rows as a frame: `(datetime, instrument)` by `(group, name)`, float32.

        This is the only operation that allocates a full frame.
        """
        span = self.date_rows(start, end)
        date, instrument = self.sample_rows(span)
        group_names = list(self.groups) if groups is None else list(groups)
        pairs = [(g, name) for g in group_names for name in self.group(g).names]
        data = np.empty((len(pairs), len(date)), dtype=np.float32)
        offset = 0
        for g in group_names:
            columns = self.group(g)
            for part in column_parts(columns.names):
                values = columns.block(part, rows=span)[:, date - span.start, instrument]
                data[offset : offset + len(part)] = values.cpu().numpy()
                offset += len(part)
        return pd.DataFrame(
            data.T,
            index=self.index(date, instrument),
            columns=pd.MultiIndex.from_tuples(pairs)
            if pairs
            else pd.MultiIndex.from_arrays([[], []]),
            copy=False,
        )


def join_views(views: Sequence[View], join: str) -> View:
    """Join the views' groups on the union of their dates and instruments.

    The rows are those of any view (outer), of all (inner), of the first (left) or the last
    (right). If several views have a column, the last one is used. Columns are NaN in rows that
    their view does not have.
    """
    first = views[0]
    calendar, instruments = first.calendar, first.instruments
    for next_view in views[1:]:
        calendar = calendar.union(next_view.calendar)
        instruments = instruments.union(next_view.instruments)
    grid_views = [reindex_view(view, calendar, instruments) for view in views]
    groups: dict[str, Columns] = {}
    for view in grid_views:
        for group, columns in view.groups.items():
            groups[group] = _merge_columns(groups[group], columns) if group in groups else columns
    return View(
        groups,
        _join_masks([v.rows for v in grid_views], join),
        _join_masks([v.history for v in grid_views], join),
    )


def reindex_view(view: View, calendar: pd.DatetimeIndex, instruments: pd.Index) -> View:
    """Reindex a view to another calendar and other instruments; new cells are NaN and not rows."""
    if view.calendar.equals(calendar) and view.instruments.equals(instruments):
        return view
    dates = torch.from_numpy(view.calendar.get_indexer(calendar).astype(np.int64))
    names = torch.from_numpy(view.instruments.get_indexer(instruments).astype(np.int64))
    missing = (dates < 0)[:, None] | (names < 0)

    def reindex_mask(mask: Tensor) -> Tensor:
        return mask[dates.clamp(min=0)][:, names.clamp(min=0)] & ~missing

    groups: dict[str, Columns] = {}
    for group, columns in view.groups.items():
        values = torch.full((len(columns.names), *missing.shape), float("nan"))
        for k, name in enumerate(columns.names):
            column_values = columns.column(name)[dates.clamp(min=0)][:, names.clamp(min=0)]
            values[k] = column_values.masked_fill(missing, float("nan"))
        panel = Panel(values.permute(1, 2, 0), calendar, instruments, columns.names)
        groups[group] = PanelColumns(panel)
    return View(groups, reindex_mask(view.rows), reindex_mask(view.history))


def restrict_view(view: View, members: Any, start: Any, end: Any) -> View:
    """Restrict a view to instruments (a list, or membership spans by name) between two dates."""
    span = view.date_rows(start, end)
    covers_all_dates = span == slice(0, len(view.calendar))
    if members is None and covers_all_dates:
        return view
    if span.start == span.stop:
        dates = coverage_dates(view.calendar)
        raise DataError(f"no date between {start} and {end}; the data covers {dates}.")
    keep = view.instruments if members is None else _select_members(members, view.instruments)
    out = reindex_view(view, view.calendar[span], keep)
    if not isinstance(members, Mapping):
        return out
    inside = torch.zeros_like(out.rows)
    for k, name in enumerate(keep):
        for first, last in members[name]:
            inside[out.date_rows(first, last), k] = True
    return replace(out, rows=out.rows & inside, history=out.history & inside)


def _select_members(members: Any, instruments: pd.Index) -> pd.Index:
    requested_names = pd.Index([str(m) for m in members], dtype="str")
    missing = requested_names[~requested_names.isin(instruments)]
    # A universe may have more instruments than the frame.
    if len(missing) and not isinstance(members, Mapping):
        raise DataError(unknown_name_message("instrument", str(missing[0]), instruments))
    return instruments[instruments.isin(requested_names)]


def _merge_columns(columns: Columns, newer: Columns) -> Columns:
    """Merge the columns of two views of one group; those of `newer` win."""
    kept_names = [n for n in columns.names if n not in set(newer.names)]
    return newer.with_columns({n: columns.column(n) for n in kept_names})


def _join_masks(masks: Sequence[Tensor], join: str) -> Tensor:
    if join in ("left", "right"):
        return masks[0 if join == "left" else -1]
    stack = torch.stack(list(masks))
    return stack.any(0) if join == "outer" else stack.all(0)
