"""Processors that select columns, rows or instruments; the others keep their values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.data.panel.columns import column_parts
from qtorch.data.panel.view import View
from qtorch.data.processor.base import FieldsGroup, Names, Processor, column_names, select_columns

log = logging.getLogger(__name__)


class _SelectionProcessor(Processor):
    def __call__(self, view: View) -> View:
        for group, names in self.output_columns(column_names(view)).items():
            columns = view.group(group)
            if names != columns.names:
                view = view.with_group(group, columns.keep(names))
        return view


class DropCol(_SelectionProcessor):
    """Drops columns by name in every group; logs a warning for a name that does not exist."""

    def __init__(self, col_list: Sequence[str] = ()) -> None:
        self.col_list = col_list

    def output_columns(self, names: Names) -> Names:
        dropped_names = set(self.col_list)
        return {
            g: tuple(n for n in columns if n not in dropped_names) for g, columns in names.items()
        }

    def check_names(self, names: Names) -> None:
        existing_names = {n for columns in names.values() for n in columns}
        for name in sorted(set(self.col_list) - existing_names):
            log.warning("DropCol: %s", unknown_name_message("column", name, existing_names))


class FilterCol(_SelectionProcessor):
    """Keeps only the named columns of a group, in the order of the data; keeps other groups.

    Raises ConfigError for a name that the group does not have (Qlib ignores it).
    """

    def __init__(self, fields_group: FieldsGroup = "feature", col_list: Sequence[str] = ()) -> None:
        self.fields_group = fields_group
        self.col_list = col_list

    def output_columns(self, names: Names) -> Names:
        kept_names = set(self.col_list)
        group_columns = select_columns(names, self.fields_group)
        existing_names = {n for columns in group_columns.values() for n in columns}
        for name in self.col_list:
            if name not in existing_names:
                raise ConfigError(
                    f"FilterCol: {unknown_name_message('column', name, existing_names)}"
                )
        return {
            g: tuple(n for n in columns if n in kept_names or n not in group_columns.get(g, ()))
            for g, columns in names.items()
        }


class HashStockFormat(Processor):
    """Does nothing; Qlib uses it to store data by instrument, which views support already."""

    columnwise = True

    def __call__(self, view: View) -> View:
        return view


class DropnaProcessor(Processor):
    """Drops the rows in which any of the group's columns is NaN.

    The rows are also dropped from windows, because a row without features is not data.
    (DropnaLabel keeps them in windows.)
    """

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def drops_by_label(self, names: Names) -> bool:
        return "label" in select_columns(names, self.fields_group)

    def __call__(self, view: View) -> View:
        complete = torch.ones_like(view.rows)
        for group, names in self.select_columns(view).items():
            for part in column_parts(names):
                complete &= ~view.group(group).block(part).isnan().any(0)
        if not self.is_for_infer():
            return view.with_rows(view.rows & complete)
        return replace(view, rows=view.rows & complete, history=view.history & complete)


class DropnaLabel(DropnaProcessor):
    """Drops the samples without a label; used only for learning.

    Windows may still contain such a row, because its features are known. This is a deliberate
    difference from Qlib, whose training windows are NaN at these rows. Raises DataError if no
    row is left.
    """

    def __init__(self, fields_group: FieldsGroup = "label") -> None:
        super().__init__(fields_group=fields_group)

    def is_for_infer(self) -> bool:
        return False

    def __call__(self, view: View) -> View:
        result = super().__call__(view)
        if bool(view.rows.any()) and not bool(result.rows.any()):
            names = ", ".join(n for part in self.select_columns(view).values() for n in part)
            raise DataError(
                f"{type(self).__name__} drops all {int(view.rows.sum())} rows, as they have NaN. "
                f"Check the expression and the data of the label. Columns: {names}."
            )
        return result


class TimeRangeFlt(Processor):
    """Keeps the instruments with rows from `start_time` or earlier to `end_time` or later.

    Rows between the two dates may be missing. The filter uses future information (which
    instruments survive), so results on such data are too optimistic, as Qlib also warns. As in
    Qlib, dates are aligned to the trading days inside the span. Also works in the
    `inst_processors` of a loader.
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
        is_kept = torch.ones_like(first, dtype=torch.bool)
        if self.start_time is not None:
            is_kept &= first <= span.start
        if self.end_time is not None:
            is_kept &= last >= span.stop - 1
        return replace(view, rows=view.rows & is_kept, history=view.history & is_kept)
