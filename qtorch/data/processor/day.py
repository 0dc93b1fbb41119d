"""Processors over the cross-section of a day: z-score, rank, fill by the mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.processor.base import FieldsGroup, Processor, chosen_columns, names_of
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


class _CrossSection(Processor):
    """Rewrites the chosen columns by a function of the day's rows; nothing else is copied."""

    columnwise = True
    fields_group: FieldsGroup

    def check(self, view: View) -> None:
        """Refuse a view that the function has nothing to say of."""

    @abstractmethod
    def of_day(self, values: Tensor, rows: Tensor) -> Tensor:
        """`values [D, N]` by the statistics of each day's `rows`."""

    def __call__(self, view: View) -> View:
        self.check(view)
        for group, names in chosen_columns(names_of(view), self.fields_group).items():
            columns = view.group(group)
            written = {n: self.of_day(columns.column(n), view.rows) for n in names}
            view = view.with_group(group, columns.with_columns(written))
        return view


class _Comparison(_CrossSection):
    """A place among the day's instruments. Raises DataError where each day has one alone."""

    def check(self, view: View) -> None:
        if len(view.rows) and int(view.rows.sum(1).max()) == 1:
            raise DataError(
                f"{type(self).__name__} compares the instruments of a day, and every day of the "
                "data has one instrument alone, so all its values would be the same. Load a "
                "universe of several, or leave the processor out."
            )


class CSZScoreNorm(_Comparison):
    """Each day's z-score over its instruments.

    `method` "zscore" is `(x - mean) / std` with ddof 1, "robust" `(x - median) / (1.4826 MAD)`
    clipped to -3..3. Days of one value or of equal values become NaN, as in Qlib.
    """

    def __init__(self, fields_group: FieldsGroup = None, method: str = "zscore") -> None:
        if method not in METHODS:
            raise ConfigError(unknown_name("method of CSZScoreNorm", method, METHODS))
        self.fields_group = fields_group
        self.method = method

    def of_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return METHODS[self.method](values, rows)


class CSRankNorm(_Comparison):
    """`(rank / count - 0.5) * 3.46` of each day: uniform ranks of about unit variance."""

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def of_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_rank_norm(values, rows)


class CSZFillna(_CrossSection):
    """The day's mean for missing values; NaN stays on a day without any value."""

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def of_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_mean_fill(values, rows)
