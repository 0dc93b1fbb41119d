"""Processors of single values: filling, tanh, and replacement of infinite values."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.panel.columns import Columns, column_parts
from qtorch.data.panel.elementwise import Affine, FillNaN, Tanh
from qtorch.data.panel.view import FLAT, View
from qtorch.data.processor.base import LABEL, FieldsGroup, Processor
from qtorch.data.processor.cross_section import day_finite_mean


class Fillna(Processor):
    """Replaces missing values by `fill_value`."""

    columnwise = True

    def __init__(self, fields_group: FieldsGroup = None, fill_value: float = 0) -> None:
        self.fields_group = fields_group
        self.fill_value = fill_value

    def __call__(self, view: View) -> View:
        for group, names in self.select_columns(view).items():
            new_columns = view.group(group).with_elementwise(names, FillNaN(float(self.fill_value)))
            view = view.with_group(group, new_columns)
        return view


class TanhProcess(Processor):
    """Computes `tanh(x - 1)` of the columns that `fields_group` selects.

    None selects all groups but `label`; in data without groups, all columns whose name does not
    contain "LABEL". Difference from Qlib: labels are told by their group, so that a label of any
    name keeps its values, and a feature may have "LABEL" in its name.
    """

    columnwise = True

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def __call__(self, view: View) -> View:
        for group, names in self.select_columns(view).items():
            if names:
                shifted_columns = view.group(group).with_elementwise(names, Affine(1.0))
                view = view.with_group(group, shifted_columns.with_elementwise(names, Tanh()))
        return view

    def select_columns(self, view: View) -> dict[str, tuple[str, ...]]:
        selection = super().select_columns(view)
        if self.fields_group is not None:
            return selection
        if view.is_flat:
            return {FLAT: tuple(n for n in selection[FLAT] if "LABEL" not in n)}
        return {group: names for group, names in selection.items() if group != LABEL}


class ProcessInf(Processor):
    """Replaces infinite values by the mean of the day's finite values, in every column.

    Only columns with infinite values are copied. Without a finite value on the day, they become
    NaN.
    """

    columnwise = True
    replaces_infinite = True

    def __call__(self, view: View) -> View:
        for group, columns in view.groups.items():
            new_columns = _replace_infinities(columns, view.rows, view.rows | view.history)
            if new_columns:
                view = view.with_group(group, columns.with_columns(new_columns))
        return view


def _replace_infinities(columns: Columns, rows: Tensor, used_rows: Tensor) -> dict[str, Tensor]:
    """Return new tensors for the columns with an infinite value in `used_rows [D, N]`.

    Their infinite values are replaced by the day's mean over `rows [D, N]`.
    """
    out: dict[str, Tensor] = {}
    if columns.is_known_finite():
        return out
    for part in column_parts(columns.names):
        if columns.is_known_finite(part):
            continue
        block = columns.block(part)
        if not bool(block.isinf().any()):
            continue
        for name, values in zip(part, block, strict=True):
            infinite = values.isinf() & used_rows
            if bool(infinite.any()):
                mean = day_finite_mean(values, rows)[:, None]
                out[name] = torch.where(infinite, mean, values)
    return out
