"""Views on one grid: joining several, and cutting one to instruments and dates."""

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


def joined(views: Sequence[View], how: str) -> View:
    """The views' groups side by side on the union of their dates and instruments.

    The rows are those of any view (outer), of all (inner), of the first (left) or the last
    (right). Of a column that several have, the last one's stays. Where a view has no row its
    columns are NaN.
    """
    first = views[0]
    calendar, instruments = first.calendar, first.instruments
    for other in views[1:]:
        calendar = calendar.union(other.calendar)
        instruments = instruments.union(other.instruments)
    aligned = [on_grid(view, calendar, instruments) for view in views]
    groups: dict[str, Columns] = {}
    for view in aligned:
        for group, columns in view.groups.items():
            groups[group] = _merged(groups[group], columns) if group in groups else columns
    return View(
        groups, _rows([v.rows for v in aligned], how), _rows([v.history for v in aligned], how)
    )


def on_grid(view: View, calendar: pd.DatetimeIndex, instruments: pd.Index) -> View:
    """The view over another calendar and other instruments; NaN and no rows where it has none."""
    if view.calendar.equals(calendar) and view.instruments.equals(instruments):
        return view
    dates = torch.from_numpy(view.calendar.get_indexer(calendar).astype(np.int64))
    names = torch.from_numpy(view.instruments.get_indexer(instruments).astype(np.int64))
    missing = (dates < 0)[:, None] | (names < 0)

    def moved(mask: Tensor) -> Tensor:
        return mask[dates.clamp(min=0)][:, names.clamp(min=0)] & ~missing

    groups: dict[str, Columns] = {}
    for group, columns in view.groups.items():
        values = torch.full((len(columns.names), *missing.shape), float("nan"))
        for k, name in enumerate(columns.names):
            taken = columns.column(name)[dates.clamp(min=0)][:, names.clamp(min=0)]
            values[k] = taken.masked_fill(missing, float("nan"))
        panel = Panel(values.permute(1, 2, 0), calendar, instruments, columns.names)
        groups[group] = PanelColumns(panel)
    return View(groups, moved(view.rows), moved(view.history))


def restricted(view: View, members: Any, start: Any, end: Any) -> View:
    """The rows of some instruments (a list, or membership spans by name) between two dates."""
    span = view.date_rows(start, end)
    whole = span == slice(0, len(view.calendar))
    if members is None and whole:
        return view
    if span.start == span.stop:
        held = f"{view.calendar[0]:%Y-%m-%d}..{view.calendar[-1]:%Y-%m-%d}"
        raise DataError(f"no date between {start} and {end}; the data holds {held}.")
    keep = view.instruments if members is None else _known(members, view.instruments)
    out = on_grid(view, view.calendar[span], keep)
    if not isinstance(members, Mapping):
        return out
    inside = torch.zeros_like(out.rows)
    for k, name in enumerate(keep):
        for first, last in members[name]:
            inside[out.date_rows(first, last), k] = True
    return replace(out, rows=out.rows & inside, history=out.history & inside)


def _known(members: Any, instruments: pd.Index) -> pd.Index:
    asked = pd.Index([str(m) for m in members], dtype="str")
    if isinstance(members, Mapping):
        return instruments[instruments.isin(asked)]  # a universe may hold more than the frame
    missing = asked[~asked.isin(instruments)]
    if len(missing):
        raise DataError(unknown_name("instrument", str(missing[0]), instruments))
    return instruments[instruments.isin(asked)]


def _merged(columns: Columns, other: Columns) -> Columns:
    """Both views' columns of one group; the other's win."""
    kept = [n for n in columns.names if n not in set(other.names)]
    return other.with_columns({n: columns.column(n) for n in kept})


def _rows(masks: Sequence[Tensor], how: str) -> Tensor:
    if how in ("left", "right"):
        return masks[0 if how == "left" else -1]
    stacked = torch.stack(list(masks))
    return stacked.any(0) if how == "outer" else stacked.all(0)
