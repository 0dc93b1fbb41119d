"""Joining views on one grid, and restricting a view to instruments and dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError, unknown_name
from qtorch.data.columns import Columns, PanelColumns
from qtorch.data.panel import Panel
from qtorch.data.view import View

HOW = ("outer", "inner", "left", "right")


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
        covered_dates = f"{view.calendar[0]:%Y-%m-%d}..{view.calendar[-1]:%Y-%m-%d}"
        raise DataError(f"no date between {start} and {end}; the data covers {covered_dates}.")
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
    if isinstance(members, Mapping):
        return instruments[
            instruments.isin(requested_names)
        ]  # a universe may have more instruments than the frame
    missing = requested_names[~requested_names.isin(instruments)]
    if len(missing):
        raise DataError(unknown_name("instrument", str(missing[0]), instruments))
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
