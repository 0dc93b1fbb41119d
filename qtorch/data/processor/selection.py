"""Processors that select columns, and HashStockFormat, which does nothing here."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.processor.base import (
    FieldsGroup,
    Names,
    Processor,
    column_names,
    select_columns,
)
from qtorch.data.view import View

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
            log.warning("DropCol: %s", unknown_name("column", name, existing_names))


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
                raise ConfigError(f"FilterCol: {unknown_name('column', name, existing_names)}")
        return {
            g: tuple(n for n in columns if n in kept_names or n not in group_columns.get(g, ()))
            for g, columns in names.items()
        }


class HashStockFormat(Processor):
    """Does nothing; Qlib uses it to store data by instrument, which views support already."""

    columnwise = True

    def __call__(self, view: View) -> View:
        return view
