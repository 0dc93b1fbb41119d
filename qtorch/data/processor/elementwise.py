"""Processors of single values: fill, tanh, and infinities by the day's mean."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.columns import Columns
from qtorch.data.elementwise import Affine, FillNaN, Tanh
from qtorch.data.processor.base import FieldsGroup, Processor, chosen_columns, names_of
from qtorch.data.processor.cross_section import day_finite_mean
from qtorch.data.view import View

BLOCK = 16


class Fillna(Processor):
    """`fill_value` for missing values."""

    columnwise = True

    def __init__(self, fields_group: FieldsGroup = None, fill_value: float = 0) -> None:
        self.fields_group = fields_group
        self.fill_value = fill_value

    def __call__(self, view: View) -> View:
        for group, names in chosen_columns(names_of(view), self.fields_group).items():
            filled = view.group(group).with_elementwise(names, FillNaN(float(self.fill_value)))
            view = view.with_group(group, filled)
        return view


class TanhProcess(Processor):
    """`tanh(x - 1)` of every column whose name does not hold "LABEL"."""

    columnwise = True

    def __call__(self, view: View) -> View:
        for group, columns in view.groups.items():
            names = [n for n in columns.names if "LABEL" not in n]
            if names:
                pressed = columns.with_elementwise(names, Affine(1.0))
                view = view.with_group(group, pressed.with_elementwise(names, Tanh()))
        return view


class ProcessInf(Processor):
    """The mean of the day's finite values in the place of infinite ones, in every column.

    Only columns that hold an infinity are written. A day without a finite value gives NaN.
    """

    columnwise = True
    mends_infinite = True

    def __call__(self, view: View) -> View:
        for group, columns in view.groups.items():
            mended = _mended(columns, view.rows, view.rows | view.history)
            if mended:
                view = view.with_group(group, columns.with_columns(mended))
        return view


def _mended(columns: Columns, rows: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """The columns that hold an infinity in a row that anyone sees, with the mean in its place."""
    out: dict[str, Tensor] = {}
    if columns.is_surely_finite():
        return out
    for first in range(0, len(columns.names), BLOCK):
        part = columns.names[first : first + BLOCK]
        if columns.is_surely_finite(part):
            continue
        block = columns.block(part)
        if not bool(block.isinf().any()):
            continue
        for name, values in zip(part, block, strict=True):
            infinite = values.isinf() & seen
            if bool(infinite.any()):
                mean = day_finite_mean(values, rows)[:, None]
                out[name] = torch.where(infinite, mean, values)
    return out
