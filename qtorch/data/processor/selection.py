"""Processors that choose columns, and the one that only names a storage."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.processor.base import (
    FieldsGroup,
    Names,
    Processor,
    chosen_columns,
    names_of,
)
from qtorch.data.view import View

log = logging.getLogger(__name__)


class _Selection(Processor):
    def __call__(self, view: View) -> View:
        for group, names in self.selects(names_of(view)).items():
            columns = view.group(group)
            if names != columns.names:
                view = view.with_group(group, columns.keep(names))
        return view


class DropCol(_Selection):
    """Takes away columns by name, in every group. A name that is not there is warned about."""

    def __init__(self, col_list: Sequence[str] = ()) -> None:
        self.col_list = col_list

    def selects(self, names: Names) -> Names:
        gone = set(self.col_list)
        return {g: tuple(n for n in columns if n not in gone) for g, columns in names.items()}

    def check_names(self, names: Names) -> None:
        known = {n for columns in names.values() for n in columns}
        for name in sorted(set(self.col_list) - known):
            log.warning("DropCol: %s", unknown_name("column", name, known))


class FilterCol(_Selection):
    """Keeps the named columns of a group, in the order of the data; other groups stay whole.

    A name that the group lacks is an error (Qlib passes over it).
    """

    def __init__(self, fields_group: FieldsGroup = "feature", col_list: Sequence[str] = ()) -> None:
        self.fields_group = fields_group
        self.col_list = col_list

    def selects(self, names: Names) -> Names:
        wanted = set(self.col_list)
        chosen = chosen_columns(names, self.fields_group)
        known = {n for columns in chosen.values() for n in columns}
        for name in self.col_list:
            if name not in known:
                raise ConfigError(f"FilterCol: {unknown_name('column', name, known)}")
        return {
            g: tuple(n for n in columns if n in wanted or n not in chosen.get(g, ()))
            for g, columns in names.items()
        }


class HashStockFormat(Processor):
    """Nothing: Qlib stores by instrument with it, and here every view is addressed so."""

    columnwise = True

    def __call__(self, view: View) -> View:
        return view
