"""Processors that take rows away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.processor.base import FieldsGroup, Names, Processor, chosen_columns, names_of
from qtorch.data.view import View

BLOCK = 16


class DropnaProcessor(Processor):
    """Takes away the rows in which any of the group's columns is missing.

    The rows are gone for windows too: what has no features is no data. (DropnaLabel leaves them
    to windows.)
    """

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def drops_by_label(self, names: Names) -> bool:
        return "label" in chosen_columns(names, self.fields_group)

    def __call__(self, view: View) -> View:
        complete = _complete(view, self.fields_group)
        if not self.is_for_infer():
            return view.with_rows(view.rows & complete)
        return replace(view, rows=view.rows & complete, history=view.history & complete)


class DropnaLabel(DropnaProcessor):
    """Takes away the samples without a label; for learning alone.

    A window may still look back at such a row, whose features are known: a deliberate difference
    from Qlib, whose training windows are blank there. Raises DataError where no row is left.
    """

    def __init__(self, fields_group: FieldsGroup = "label") -> None:
        super().__init__(fields_group=fields_group)

    def is_for_infer(self) -> bool:
        return False

    def __call__(self, view: View) -> View:
        result = super().__call__(view)
        if bool(view.rows.any()) and not bool(result.rows.any()):
            chosen = chosen_columns(names_of(view), self.fields_group)
            names = ", ".join(n for part in chosen.values() for n in part)
            raise DataError(
                f"{type(self).__name__} leaves none of {int(view.rows.sum())} rows to learn from. "
                f"Is the label NaN everywhere (its expression, its data)? Columns: {names}."
            )
        return result


class TimeRangeFlt(Processor):
    """Keeps the instruments whose rows begin by `start_time` and last until `end_time`.

    What lies between is not checked. It looks into the future (which instruments survive):
    results on such data are too good, as Qlib's docstring says too. Dates are aligned to the
    trading days inside the span, as there. Also usable as an `inst_processors` of a loader.
    """

    def __init__(self, start_time: Any = None, end_time: Any = None, freq: str = "day") -> None:
        self.start_time = start_time
        self.end_time = end_time
        self.freq = freq

    def __call__(self, view: View) -> View:
        span = view.date_rows(self.start_time, self.end_time)
        d = len(view.calendar)
        order = torch.arange(d, device=view.rows.device)[:, None]
        first = torch.where(view.rows, order, d).amin(0)
        last = torch.where(view.rows, order, -1).amax(0)
        kept = torch.ones_like(first, dtype=torch.bool)
        if self.start_time is not None:
            kept &= first <= span.start
        if self.end_time is not None:
            kept &= last >= span.stop - 1
        return replace(view, rows=view.rows & kept, history=view.history & kept)


def _complete(view: View, fields_group: FieldsGroup) -> Tensor:
    """`[D, N]` bool: no chosen column is missing."""
    out = torch.ones_like(view.rows)
    for group, names in chosen_columns(names_of(view), fields_group).items():
        columns = view.group(group)
        for first in range(0, len(names), BLOCK):
            out &= ~columns.block(names[first : first + BLOCK]).isnan().any(0)
    return out
