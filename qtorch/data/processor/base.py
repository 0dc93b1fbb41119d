"""What a processor is: a pure map of views, with statistics learnt on the fit window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError, NotFittedError, unknown_name
from qtorch.core.serial import Serializable, State
from qtorch.core.trust import trusted_type
from qtorch.data.view import View

FieldsGroup: TypeAlias = str | Sequence[str | tuple[str, str]] | None
Names: TypeAlias = Mapping[str, tuple[str, ...]]

FLAT = ""  # the one group of data whose columns have no groups
_KEEP: Any = object()


@trusted_type
class Processor(Configured, Serializable, ABC):
    """One step from a loader's raw data to what a network sees; Qlib's Processor on tensors.

    `fit(view)` learns statistics from the rows of a view (the handler hands over the fit
    window's), `processor(view)` gives another view and changes nothing of the one given. What
    was learnt lies in attributes with a trailing underscore, named in `state_names` (tensors)
    and `columns_`, so that it can be stored without pickle.

    A processor with the attributes `fit_start_time` and `fit_end_time` fits on these dates
    (inclusive) where they are given. Answers to qlib/data/dataset/processor.py; unlike there,
    nothing is ever written in place.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    #: Each column's result depends on that column alone, and no row or column is taken away:
    #: columns that a later step drops then need not be computed at all.
    columnwise: ClassVar[bool] = False
    #: It puts something in the place of infinite values, in every column: they may be loaded, and
    #: a label may have had some.
    mends_infinite: bool = False

    fit_start_time: Any = None
    fit_end_time: Any = None
    columns_: tuple[tuple[str, str], ...] | None = None

    def fit(self, view: View) -> None:
        """Learn from the view's rows; the view of the fit window."""

    @abstractmethod
    def __call__(self, view: View) -> View:
        """The processed view; `view` and all that it holds stay as they are."""

    def is_for_infer(self) -> bool:
        """Whether it may be used where no label is known."""
        return True

    def readonly(self) -> bool:
        """Qlib's question whether the input is left alone: always."""
        return True

    def selects(self, names: Names) -> Names:
        """The columns that stay, by group, of those given."""
        return names

    def drops_by_label(self, names: Names) -> bool:
        """Whether rows are taken away because of what their label is, or is missing."""
        return False

    def check_names(self, names: Names) -> None:
        """Warn of names in the arguments that the data lacks; asked once, with all columns."""

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
        *,
        fit_start_time: Any = _KEEP,
        fit_end_time: Any = _KEEP,
    ) -> None:
        """Serializable's options, and another fit window (where the processor has one)."""
        for name, value in (("fit_start_time", fit_start_time), ("fit_end_time", fit_end_time)):
            if value is not _KEEP and self.has_fit_window():
                setattr(self, name, value)
                self._arguments = {**self._arguments, name: value}
        super().config(dump_all, exclude, include, recursive)

    def has_fit_window(self) -> bool:
        """Whether it learns from the dates of a fit window."""
        return bool(self.state_names)

    # -- what was learnt -----------------------------------------------------------------------

    def fitted_state(self) -> State | None:
        """What `fit` has learnt, or None for a processor that learns nothing.

        Raises NotFittedError before `fit`.
        """
        if not self.state_names:
            return None
        columns = self._fitted_columns()
        tensors = {name: getattr(self, name) for name in self.state_names}
        return State({"columns": [list(c) for c in columns]}, tensors)

    def load_fitted(self, state: State) -> None:
        """Take over what another processor of this kind has learnt."""
        self.columns_ = tuple((str(g), str(n)) for g, n in state.config["columns"])
        for name in self.state_names:
            if name not in state.tensors:
                raise DataError(
                    f"the stored state of {type(self).__name__} lacks {name!r}; it holds "
                    f"{sorted(state.tensors)}."
                )
            setattr(self, name, state.tensors[name].detach().to("cpu", torch.float32))

    def _fitted_columns(self) -> tuple[tuple[str, str], ...]:
        if self.columns_ is None:
            raise NotFittedError(
                f"{type(self).__name__} is not fitted: call fit(view) on the view of the fit "
                "window first, or load a stored state. A handler does it by itself."
            )
        return self.columns_

    def _places(self, group: str, names: Sequence[str]) -> Tensor:
        """Where the statistics of these columns stand; an error for a column never fitted."""
        place = {column: k for k, column in enumerate(self._fitted_columns())}
        missing = [n for n in names if (group, n) not in place]
        if missing:
            raise DataError(
                f"{type(self).__name__} was fitted without the column {missing[0]!r} of group "
                f"{group!r} ({len(missing)} such columns); fit it on data with these columns."
            )
        return torch.tensor([place[group, n] for n in names], dtype=torch.int64)


def chosen_columns(groups: Names, fields_group: FieldsGroup) -> dict[str, tuple[str, ...]]:
    """The columns that `fields_group` means, by group.

    None is every column of every group (labels too, as in Qlib), a string one group, a list
    several groups or `(group, column)` pairs. In data without groups a string is a column.
    """
    if fields_group is None:
        return {g: tuple(names) for g, names in groups.items()}
    asked = [fields_group] if isinstance(fields_group, str) else list(fields_group)
    found: dict[str, tuple[str, ...]] = {}
    for item in asked:
        group, names = _meant(groups, item)
        found[group] = (*found.get(group, ()), *(n for n in names if n not in found.get(group, ())))
    return found


def _meant(groups: Names, item: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(item, tuple | list) and len(item) == 2:
        group, name = str(item[0]), str(item[1])
        if group not in groups:
            raise ConfigError(unknown_name("group of columns", group, groups))
        if name not in groups[group]:
            raise ConfigError(unknown_name(f"column of {group!r}", name, groups[group]))
        return group, (name,)
    if not isinstance(item, str):
        raise ConfigError(
            f"fields_group holds {item!r}; expected the name of a group or a (group, column) pair."
        )
    if item in groups:
        return item, tuple(groups[item])
    if set(groups) == {FLAT}:
        if item in groups[FLAT]:
            return FLAT, (item,)
        raise ConfigError(unknown_name("column", item, groups[FLAT]))
    raise ConfigError(unknown_name("group of columns", item, groups))


def names_of(view: View) -> dict[str, tuple[str, ...]]:
    """The columns of a view, by group."""
    return {group: columns.names for group, columns in view.groups.items()}


def in_window(view: View, start: Any, end: Any) -> View:
    """The view with the rows of an inclusive date span alone; open ends are None."""
    if start is None and end is None:
        return view
    span = view.date_rows(start, end)
    inside = torch.zeros_like(view.rows)
    inside[span] = view.rows[span]
    return view.with_rows(inside)
