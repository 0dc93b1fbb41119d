"""The base class of processors: pure functions of views, with statistics from a fit window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import (
    ConfigError,
    DataError,
    NotFittedError,
    refuse_old_names,
    unknown_name_message,
)
from qtorch.core.serial import Serializable, State
from qtorch.core.trust import trust_subclasses
from qtorch.data.panel.view import FLAT, View

FieldsGroup: TypeAlias = str | Sequence[str | tuple[str, str]] | None
Names: TypeAlias = Mapping[str, tuple[str, ...]]

OLD_NAMES = {
    "mends_infinite": "replaces_infinite",
    "selects": "output_columns",
    "fitted_state": "get_fitted_state",
    "load_fitted": "load_fitted_state",
}
_UNCHANGED: Any = object()
LABEL = "label"  # the group of labels


@trust_subclasses
class Processor(Configured, Serializable, ABC):
    """A step of data processing; Qlib's Processor on tensors.

    `fit(view)` computes statistics from the rows of a view (the handler passes the fit window);
    `processor(view)` returns a new view and leaves its input unchanged. The fitted state is kept
    in attributes with a trailing underscore: the tensors listed in `state_names`, and
    `columns_`. It can be stored without pickle.

    `fields_group` of a processor selects its columns; None means all of them, as in Qlib: also the
    label. For the features only, pass `fields_group="feature"`.

    If `fit_start_time` and `fit_end_time` are set, `fit` uses these dates (inclusive) only.
    Corresponds to qlib/data/dataset/processor.py; unlike there, nothing is written in place.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    #: True if each output column depends only on the same input column and no row or column is
    #: dropped. Columns that a later processor drops then need not be computed at all.
    columnwise: ClassVar[bool] = False
    #: True if infinite values are replaced in every column. Infinite values are then allowed in
    #: the loaded data, including the label.
    replaces_infinite: bool = False

    fields_group: FieldsGroup = None
    fit_start_time: Any = None
    fit_end_time: Any = None
    columns_: tuple[tuple[str, str], ...] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_old_names(cls, OLD_NAMES)

    def fit(self, view: View) -> None:
        """Compute the statistics from the rows of `view`, which is the view of the fit window."""

    @abstractmethod
    def __call__(self, view: View) -> View:
        """Return the processed view; `view` and its tensors stay unchanged."""

    def is_for_infer(self) -> bool:
        """Whether the processor may be used for inference, when no label is known."""
        return True

    def readonly(self) -> bool:
        """Whether the input stays unchanged, as in Qlib: always True."""
        return True

    def select_columns(self, view: View) -> dict[str, tuple[str, ...]]:
        """Return the columns that `fields_group` selects, by group."""
        return select_columns(column_names(view), self.fields_group)

    def output_columns(self, names: Names) -> Names:
        """Return the columns of the output by group, for the input columns `names`."""
        return names

    def drops_by_label(self, names: Names) -> bool:
        """Whether rows are dropped because of the value of their label, such as NaN."""
        return False

    def check_names(self, names: Names) -> None:
        """Warn about arguments that name columns which do not exist; called with all columns."""

    def config(
        self,
        *args: Any,
        fit_start_time: Any = _UNCHANGED,
        fit_end_time: Any = _UNCHANGED,
        **kwargs: Any,
    ) -> None:
        """Set the options of Serializable, and the fit window if the processor has one."""
        for name, value in (("fit_start_time", fit_start_time), ("fit_end_time", fit_end_time)):
            if value is not _UNCHANGED and self.has_fit_window():
                setattr(self, name, value)
                self._arguments = {**self._arguments, name: value}
        super().config(*args, **kwargs)

    def has_fit_window(self) -> bool:
        """Whether `fit` computes statistics from a fit window."""
        return bool(self.state_names)

    # -- fitted state --------------------------------------------------------------------------

    def get_fitted_state(self) -> State | None:
        """Return the fitted state, or None for a processor without one.

        Raises NotFittedError before `fit`.
        """
        if not self.state_names:
            return None
        columns = self._get_fitted_columns()
        tensors = {name: getattr(self, name) for name in self.state_names}
        return State({"columns": [list(c) for c in columns]}, tensors)

    def load_fitted_state(self, state: State) -> None:
        """Load the fitted state of another processor of this class."""
        self.columns_ = tuple((str(g), str(n)) for g, n in state.config["columns"])
        for name in self.state_names:
            if name not in state.tensors:
                raise DataError(
                    f"the stored state of {type(self).__name__} has no {name!r}; it has "
                    f"{sorted(state.tensors)}."
                )
            setattr(self, name, state.tensors[name].detach().to("cpu", torch.float32))

    def _get_fitted_columns(self) -> tuple[tuple[str, str], ...]:
        if self.columns_ is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: call fit(view) on the view of the fit "
                "window first, or load a stored state. A handler does this automatically."
            )
        return self.columns_

    def _get_positions(self, group: str, names: Sequence[str]) -> Tensor:
        """Return the positions of columns in the statistics; DataError for a column not fitted."""
        position = {column: k for k, column in enumerate(self._get_fitted_columns())}
        missing = [n for n in names if (group, n) not in position]
        if missing:
            raise DataError(
                f"{type(self).__name__} was fitted without the column {missing[0]!r} of group "
                f"{group!r} ({len(missing)} such columns); fit it on data with these columns."
            )
        return torch.tensor([position[group, n] for n in names], dtype=torch.int64)


def select_columns(groups: Names, fields_group: FieldsGroup) -> dict[str, tuple[str, ...]]:
    """Return the columns that `fields_group` selects, by group.

    None selects every column of every group (including labels, as in Qlib), a string selects a
    group, and a list selects several groups or `(group, column)` pairs. If the data has no
    groups, a string selects a column.
    """
    if fields_group is None:
        return {g: tuple(names) for g, names in groups.items()}
    items = [fields_group] if isinstance(fields_group, str) else list(fields_group)
    selection: dict[str, tuple[str, ...]] = {}
    for item in items:
        group, names = _resolve_item(groups, item)
        selection[group] = (
            *selection.get(group, ()),
            *(n for n in names if n not in selection.get(group, ())),
        )
    return selection


def _resolve_item(groups: Names, item: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(item, tuple | list) and len(item) == 2:
        group, name = str(item[0]), str(item[1])
        if group not in groups:
            raise ConfigError(unknown_name_message("group of columns", group, groups))
        if name not in groups[group]:
            raise ConfigError(unknown_name_message(f"column of {group!r}", name, groups[group]))
        return group, (name,)
    if not isinstance(item, str):
        raise ConfigError(
            f"fields_group contains {item!r}; expected a group name or a (group, column) pair."
        )
    if item in groups:
        return item, tuple(groups[item])
    if set(groups) == {FLAT}:
        if item in groups[FLAT]:
            return FLAT, (item,)
        raise ConfigError(unknown_name_message("column", item, groups[FLAT]))
    raise ConfigError(unknown_name_message("group of columns", item, groups))


def column_names(view: View) -> dict[str, tuple[str, ...]]:
    """Return the column names of a view by group."""
    return {group: columns.names for group, columns in view.groups.items()}


def select_dates(view: View, start: Any, end: Any) -> View:
    """Return the view with only the rows of an inclusive date span; None is an open end."""
    if start is None and end is None:
        return view
    dates = view.date_rows(start, end)
    rows = torch.zeros_like(view.rows)
    rows[dates] = view.rows[dates]
    return view.with_rows(rows)
