"""Compare what two copies of a dataset show for the days before their data differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import format_count
from qtorch.data.panel.columns import Columns, column_parts
from qtorch.data.panel.view import View
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, Line

# A cell has moved if it differs by more than this share of its size plus its column's deviation:
# float32 sums of other orders differ by less, and a leak moves cells by much more.
TOLERANCE = 1e-4
MAX_NAMES = 3


class Moves:
    """The cells that moved, collected over dates and methods; `name` is the line of the report."""

    def __init__(self, name: str, unit: str = "cells") -> None:
        self.name, self.unit = name, unit
        self.num_compared = self.num_moved = 0
        self.columns: Counter[str] = Counter()
        self.days_before = 0
        self.example = ""
        self.methods: set[str] = set()

    def record(self, num_compared: int) -> None:
        """Count cells that were compared."""
        self.num_compared += num_compared

    def add(
        self, count: int, column: str, days_before: int, example: str, method: str | None = None
    ) -> None:
        """Add moved cells of a column; `days_before`: how many days before the change at most."""
        if not count:
            return
        self.example = self.example or example
        self.num_moved += count
        self.columns[column] += count
        self.days_before = max(self.days_before, days_before)
        if method is not None:
            self.methods.add(method)

    def line(self, stable: str, empty: str = "there is none") -> Line:
        """Return the line of the report; `stable` says what did not move."""
        if not self.num_compared and not self.num_moved:
            return Line(self.name, UNKNOWN, empty)
        if not self.num_moved:
            return Line(self.name, OK, f"{self.num_compared:,} {self.unit}: {stable}")
        names = [name for name, _ in self.columns.most_common(MAX_NAMES)]
        suffix = (
            f" and {len(self.columns) - MAX_NAMES} more" if len(self.columns) > MAX_NAMES else ""
        )
        methods = f" ({', '.join(sorted(self.methods))})" if self.methods else ""
        detail = (
            f"{self.num_moved:,} of {self.num_compared:,} {self.unit} move when later data changes"
            f"{methods}, up to {format_count(self.days_before, 'day')} before it: "
            f"{', '.join(names)}{suffix}; e.g. {self.example}"
        )
        return Line(self.name, LEAK, detail)


def cells_differ(first: Tensor, second: Tensor, scale: Tensor | float) -> Tensor:
    """Return which values differ by more than float32 arithmetic explains; NaN equals NaN."""
    both_missing = first.isnan() & second.isnan()
    # Negated, so that a NaN or an infinity on one side counts as far.
    is_far = ~((first - second).abs() <= TOLERANCE * (first.abs() + scale))
    is_far |= first.isinf() | second.isinf()
    return is_far & (first != second) & ~both_missing


def column_scales(values: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation of the finite values of each column, `[K, 1, 1]`."""
    used = values.isfinite() & mask
    count = used.sum((1, 2), keepdim=True).clamp(min=1)
    exact = values.where(used, torch.zeros(())).double()
    mean = exact.sum((1, 2), keepdim=True) / count
    square = (exact - mean).square().where(used, torch.zeros((), dtype=torch.float64))
    return (square.sum((1, 2), keepdim=True) / count).sqrt().float()


def read_cells(
    columns: Columns, names: Sequence[str], dates: pd.DatetimeIndex, instruments: pd.Index
) -> Tensor:
    """Return columns `[K, R, N]` for dates and instruments; NaN where the columns lack them."""
    rows, places = _positions(columns.calendar, columns.instruments, dates, instruments)
    out = torch.full((len(names), len(dates), len(instruments)), torch.nan)
    if not (rows >= 0).any() or not (places >= 0).any():
        return out
    first, last = int(rows[rows >= 0].min()), int(rows.max())
    block = columns.block(names, rows=slice(first, last + 1)).cpu()
    out = block[:, (rows - first).clamp(min=0)][:, :, places.clamp(min=0)]
    return out.masked_fill((rows < 0)[:, None] | (places < 0), torch.nan)


def read_mask(mask: Tensor, view: View, dates: pd.DatetimeIndex, instruments: pd.Index) -> Tensor:
    """Return a mask of a view `[R, N]` for dates and instruments; False where it lacks them."""
    rows, places = _positions(view.calendar, view.instruments, dates, instruments)
    cells = mask.cpu()[rows.clamp(min=0)][:, places.clamp(min=0)]
    return cells & (rows >= 0)[:, None] & (places >= 0)


def _positions(
    calendar: pd.DatetimeIndex,
    names: pd.Index,
    dates: pd.DatetimeIndex,
    instruments: pd.Index,
) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(calendar.get_indexer(dates).astype(np.int64))
    return rows, torch.from_numpy(names.get_indexer(instruments).astype(np.int64))


def compare_columns(
    parts: Sequence[tuple[Moves, Tensor]],
    base: Columns,
    changed: Columns,
    rows: slice,
    *,
    method: str,
) -> None:
    """Compare columns on the base's rows, of which the last is that before the change.

    `parts`: each line of the report, and its cells `[R, N]`.
    """
    dates, instruments = base.calendar[rows], base.instruments
    kept_names = set(changed.names)
    cells = torch.stack([part_cells for _, part_cells in parts]).any(0)
    for part in column_parts(base.names):
        names = [n for n in part if n in kept_names]
        for name in set(part) - kept_names:
            parts[0][0].add(int(cells.sum()), name, len(dates), f"column {name} is missing", method)
        if not names:
            continue
        values = base.block(names, rows=rows).cpu()
        other_values = read_cells(changed, names, dates, instruments)
        moved = cells_differ(values, other_values, column_scales(values, cells)) & cells
        for moves, part_cells in parts:
            moves.record(int(part_cells.sum()) * len(names))
        for k in torch.nonzero(moved.flatten(1).any(1))[:, 0].tolist():
            for moves, part_cells in parts:
                pair = (values[k], other_values[k])
                _add_column(moves, names[k], moved[k] & part_cells, pair, base, rows, method)


def _add_column(
    moves: Moves,
    name: str,
    moved: Tensor,
    pair: tuple[Tensor, Tensor],
    base: Columns,
    rows: slice,
    method: str,
) -> None:
    cells = torch.nonzero(moved)
    if not len(cells):
        return
    row, place = cells[-1].tolist()
    date = base.calendar[rows.start + row]
    example = (
        f"{name} of {base.instruments[place]} on {date:%Y-%m-%d} was {pair[0][row, place]:.4g} and "
        f"became {pair[1][row, place]:.4g}"
    )
    moves.add(len(cells), name, len(moved) - int(cells[:, 0].min()), example, method)


def compare_masks(
    moves: Moves, base: View, changed: View, masks: tuple[Tensor, Tensor], stop: int, *, method: str
) -> None:
    """Compare masks of two views on all rows before `stop`, for the instruments of both."""
    instruments = base.instruments.union(changed.instruments)
    dates = base.calendar[:stop]
    first = read_mask(masks[0], base, dates, instruments)
    second = read_mask(masks[1], changed, dates, instruments)
    moved = first != second
    moves.record(moved.numel())
    cells = torch.nonzero(moved)
    if len(cells):
        row, place = cells[-1].tolist()
        change = "enters" if second[row, place] else "leaves"
        example = f"{instruments[place]} {change} on {dates[row]:%Y-%m-%d}"
        moves.add(len(cells), "rows", stop - int(cells[:, 0].min()), example, method)
