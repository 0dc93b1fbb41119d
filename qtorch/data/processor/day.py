"""Processors of the daily cross-section: z-score, rank, and filling with the mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.processor.base import FieldsGroup, Processor, column_names, select_columns
from qtorch.data.processor.cross_section import (
    day_mean_fill,
    day_rank_norm,
    day_robust_zscore,
    day_zscore,
)
from qtorch.data.view import View

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zscore": day_zscore,
    "robust": day_robust_zscore,
}


class _CrossSectionProcessor(Processor):
    """Base class that transforms the selected columns day by day; others are not copied."""

    columnwise = True
    fields_group: FieldsGroup

    def check(self, view: View) -> None:
        """Raise DataError for a view on which the transformation is meaningless."""

    @abstractmethod
    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        """Transform `values [D, N]` with the statistics of each day's `rows [D, N]`."""

    def __call__(self, view: View) -> View:
        self.check(view)
        for group, names in select_columns(column_names(view), self.fields_group).items():
            columns = view.group(group)
            new_columns = {n: self.transform_day(columns.column(n), view.rows) for n in names}
            view = view.with_group(group, columns.with_columns(new_columns))
        return view


class _ComparisonProcessor(_CrossSectionProcessor):
    """Base class that compares the instruments of a day.

    Raises DataError if no day has more than one instrument.
    """

    def check(self, view: View) -> None:
        if len(view.rows) and int(view.rows.sum(1).max()) == 1:
            raise DataError(
                f"{type(self).__name__} compares the instruments of a day, but no day of the data "
                "has more than one, so all its values would be the same. Load a universe with "
                "several instruments, or remove the processor."
            )


class CSZScoreNorm(_ComparisonProcessor):
    """Computes the z-score over the instruments of each day.

    `method` "zscore" is `(x - mean) / std` with ddof 1; "robust" is `(x - median) / (1.4826 MAD)`
    clipped to -3..3. Days with a single value or equal values become NaN, as in Qlib.
    """

    def __init__(self, fields_group: FieldsGroup = None, method: str = "zscore") -> None:
        if method not in METHODS:
            raise ConfigError(unknown_name("method of CSZScoreNorm", method, METHODS))
        self.fields_group = fields_group
        self.method = method

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return METHODS[self.method](values, rows)


class CSRankNorm(_ComparisonProcessor):
    """Computes `(rank / count - 0.5) * 3.46` by day: uniform ranks of about unit variance."""

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_rank_norm(values, rows)


class CSZFillna(_CrossSectionProcessor):
    """Fills missing values with the day's mean; they stay NaN on a day without values."""

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_mean_fill(values, rows)
