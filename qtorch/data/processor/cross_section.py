"""Processors of each day's cross-section: z-scores, ranks, and means for missing values.

Their statistics are pure functions of `values [D, N]` float32 (NaN is missing) and `rows [D, N]`
bool, which selects the values that enter the statistics of each day. Values outside `rows` are
transformed with the same statistics, because windows may look back at them; missing values stay
missing. A result at date t depends on date t only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.data.panel.day_order import average_ranks
from qtorch.data.panel.view import View
from qtorch.data.processor.base import FieldsGroup, Processor

MAD_SCALE = 1.4826  # standard deviation / median absolute deviation of a normal distribution
RANK_SCALE = 3.46  # 1 / standard deviation of a uniform distribution, rounded as in Qlib
CLIP = 3.0


def day_zscore(values: Tensor, rows: Tensor) -> Tensor:
    """Compute `(x - mean) / std` by day, with ddof 1 in std.

    As in Qlib, days with an infinite value, a single value, or equal values become NaN.
    """
    used = rows & ~values.isnan()
    exact = values.double()
    count = used.sum(1, keepdim=True)
    mean = _sum(exact, used) / count
    square = _sum((exact - mean).square(), used)
    std = (square / (count - 1)).sqrt()
    return ((exact - mean) / std.where(count > 1, torch.nan)).to(values.dtype)


def day_robust_zscore(values: Tensor, rows: Tensor) -> Tensor:
    """Compute `(x - median) / (1.4826 * MAD)` by day, clipped to -3..3.

    If the MAD is zero, the result is 3, -3, or NaN for a value equal to the median.
    """
    deviations = values - day_median(values, rows)
    mad = day_median(deviations.abs(), rows)
    return (deviations / mad / MAD_SCALE).clamp(-CLIP, CLIP)


def day_rank_norm(values: Tensor, rows: Tensor) -> Tensor:
    """Compute `(rank / count - 0.5) * 3.46` by day; ties get their average rank.

    A value outside `rows` gets the rank that it would have among the day's values, or NaN if the
    day has no values.
    """
    used = rows & ~values.isnan()
    count = used.sum(1, keepdim=True)
    # Values that are not ranked are set to +inf to sort last. They tie with true +inf values, so
    # the ranks of those are computed separately below.
    key = values.masked_fill(~used, torch.inf)
    sorted_key, order = key.sort(dim=1)
    ranks = torch.empty_like(values).scatter_(1, order, average_ranks(sorted_key).to(values.dtype))
    largest = used & key.isposinf()
    smaller = count - largest.sum(1, keepdim=True)
    ranks = torch.where(largest, ((smaller + count + 1) / 2).to(ranks.dtype), ranks)
    ranks = _rank_outside(ranks, values, used, sorted_key)
    count = count.where(count > 0, torch.nan)
    return ((ranks.double() / count - 0.5) * RANK_SCALE).to(values.dtype)


def day_mean_fill(values: Tensor, rows: Tensor) -> Tensor:
    """Replace missing values by the day's mean; they stay NaN if the day has no value."""
    used = rows & ~values.isnan()
    mean = (_sum(values.double(), used) / used.sum(1, keepdim=True)).to(values.dtype)
    return torch.where(values.isnan(), mean, values)


def day_finite_mean(values: Tensor, rows: Tensor) -> Tensor:
    """Compute the mean of the finite values of each day: `[D]`."""
    used = rows & values.isfinite()
    return (_sum(values.double(), used)[:, 0] / used.sum(1)).to(values.dtype)


def day_median(values: Tensor, rows: Tensor) -> Tensor:
    """Compute the median of each day `[D, 1]`, averaging the middle two; NaN without values."""
    used = rows & ~values.isnan()
    sorted_values = values.masked_fill(~used, torch.nan).sort(dim=1).values
    count = used.sum(1, keepdim=True)
    low = sorted_values.gather(1, ((count - 1) // 2).clamp(min=0))
    high = sorted_values.gather(1, (count // 2).clamp(max=values.shape[1] - 1))
    middle = torch.where(low == high, low, (low.double() + high.double()).div(2).to(values.dtype))
    return middle.masked_fill(count == 0, torch.nan)


def _sum(values: Tensor, used: Tensor) -> Tensor:
    return values.masked_fill(~used, 0).sum(1, keepdim=True)


def _rank_outside(ranks: Tensor, values: Tensor, used: Tensor, sorted_key: Tensor) -> Tensor:
    """Add ranks for the values outside the rows, midway between their neighbours."""
    ranks = ranks.masked_fill(~used, torch.nan)
    outside = ~used & ~values.isnan()
    days = outside.any(1)
    if not bool(days.any()):
        return ranks
    outside_values, day_values = values[days].contiguous(), sorted_key[days].contiguous()
    count = used[days].sum(1, keepdim=True)
    low = torch.searchsorted(day_values, outside_values, side="left").minimum(count)
    high = torch.searchsorted(day_values, outside_values, side="right").minimum(count)
    ranks[days] = torch.where(outside[days], (low + high + 1).to(ranks.dtype) / 2, ranks[days])
    return ranks


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zscore": day_zscore,
    "robust": day_robust_zscore,
}


class _CrossSectionProcessor(Processor):
    """Base class that transforms the selected columns day by day; others are not copied."""

    columnwise = True
    #: Whether the instruments of a day are compared, which is meaningless if no day has several.
    compares_instruments: ClassVar[bool] = True

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    @abstractmethod
    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        """Transform `values [D, N]` with the statistics of each day's `rows [D, N]`."""

    def __call__(self, view: View) -> View:
        if self.compares_instruments and len(view.rows) and int(view.rows.sum(1).max()) == 1:
            raise DataError(
                f"{type(self).__name__} compares the instruments of a day, but no day of the data "
                "has more than one, so all its values would be the same. Load a universe with "
                "several instruments, or remove the processor."
            )
        for group, names in self.select_columns(view).items():
            columns = view.group(group)
            new_columns = {n: self.transform_day(columns.column(n), view.rows) for n in names}
            view = view.with_group(group, columns.with_columns(new_columns))
        return view


class CSZScoreNorm(_CrossSectionProcessor):
    """Computes the z-score over the instruments of each day.

    `method` "zscore" is `(x - mean) / std` with ddof 1; "robust" is `(x - median) / (1.4826 MAD)`
    clipped to -3..3. Days with a single value or equal values become NaN, as in Qlib.
    """

    def __init__(self, fields_group: FieldsGroup = None, method: str = "zscore") -> None:
        if method not in METHODS:
            raise ConfigError(unknown_name_message("method of CSZScoreNorm", method, METHODS))
        super().__init__(fields_group)
        self.method = method

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return METHODS[self.method](values, rows)


class CSRankNorm(_CrossSectionProcessor):
    """Computes `(rank / count - 0.5) * 3.46` by day: uniform ranks of about unit variance."""

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_rank_norm(values, rows)


class CSZFillna(_CrossSectionProcessor):
    """Fills missing values with the day's mean; they stay NaN on a day without values."""

    compares_instruments = False

    def transform_day(self, values: Tensor, rows: Tensor) -> Tensor:
        return day_mean_fill(values, rows)
