"""Daily information coefficients on tensors, computed on the device without synchronising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A standard deviation below this fraction of the mean is rounding error: the values are constant.
_RELATIVE_SPREAD = 1e-13


@dataclass(frozen=True)
class DailyIC:
    """IC and Rank IC per day, `[D]` float64, NaN for days without one; `count [D]` is the pairs."""

    ic: Tensor
    rank_ic: Tensor
    count: Tensor

    def mean_ic(self) -> Tensor:
        """Mean IC over the days that have one, as a float64 scalar on the device."""
        return torch.nanmean(self.ic)

    def mean_rank_ic(self) -> Tensor:
        """Mean Rank IC over the days that have one."""
        return torch.nanmean(self.rank_ic)

    def merge(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> DailyIC:
        """Combine the days of all ranks; `all_reduce_sum` sums a tensor over the ranks.

        Each day must have been evaluated by one rank only, so that the sum leaves it unchanged.
        """
        pair = torch.stack((self.ic, self.rank_ic))
        is_valid = ~pair.isnan()
        sums = all_reduce_sum(
            torch.cat((pair.nan_to_num(), is_valid.double(), self.count.double()[None]))
        )
        pair = sums[:2].masked_fill(sums[2:4] == 0, torch.nan)
        return DailyIC(pair[0], pair[1], sums[4])


def daily_ic(
    score: Tensor, label: Tensor, day: Tensor, num_days: int, mask: Tensor | None = None
) -> DailyIC:
    """Pearson and Spearman correlation of `score [S]` and `label [S]` within each day.

    `day [S]` holds day numbers in [0, num_days). Pairs with a NaN or with False in `mask` are left
    out. Ties get their mean rank. A day with fewer than two pairs, or with a constant score or
    label, is NaN. Sums are float64. The host never waits for the device.
    """
    valid = ~(torch.isnan(score) | torch.isnan(label))
    if mask is not None:
        valid = valid & mask
    # Invalid pairs go to an extra day instead of being removed: the shapes then do not depend on
    # the data, and the host need not wait for the device.
    day = torch.where(valid, day, num_days)
    day, order = torch.sort(day, stable=True)
    x = torch.where(valid, score, 0.0).double().index_select(0, order)
    y = torch.where(valid, label, 0.0).double().index_select(0, order)
    days = _Days(day, num_days + 1)
    ic = _pearson(x, y, days)
    rank_ic = _pearson(ranks(x, day), ranks(y, day), days)
    return DailyIC(ic[:num_days], rank_ic[:num_days], days.count[:num_days])


class ICMeter:
    """Collects scores batch by batch and computes their IC and Rank IC at the end.

    Ranks need whole days, so all batches are kept (on the device) until `compute`.
    """

    def __init__(self, num_days: int) -> None:
        self.num_days = num_days
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def reset(self) -> None:
        """Drop all collected batches."""
        self._parts.clear()

    def update(self, score: Tensor, label: Tensor, day: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: tensors of the same shape, `[B]` or `[G, N]`."""
        keep = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
        float_score = score.detach().float()
        self._parts.append(
            (float_score.reshape(-1), label.reshape(-1), day.reshape(-1), keep.reshape(-1))
        )

    def compute(self) -> DailyIC:
        """IC and Rank IC of all batches since `reset`; every day is NaN if there were none."""
        if not self._parts:
            empty = torch.zeros(0)
            return daily_ic(empty, empty, empty.long(), self.num_days)
        score, label, day, mask = (torch.cat(part) for part in zip(*self._parts, strict=True))
        return daily_ic(score, label, day, self.num_days, mask)


def ranks(values: Tensor, day: Tensor) -> Tensor:
    """Rank of each of `values [S]` within its day, starting at 1; ties get their mean rank."""
    order = torch.argsort(_sort_keys(values), stable=True)
    sorted_day, by_day = torch.sort(day.index_select(0, order), stable=True)
    order = order.index_select(0, by_day)
    sorted_values = values.index_select(0, order)
    is_new_day = sorted_day[1:] != sorted_day[:-1]
    is_new_group = is_new_day | (sorted_values[1:] != sorted_values[:-1])  # of equal values
    places = torch.arange(len(day), device=day.device)
    first = _latest(is_new_group, places)
    last = len(day) - 1 - _latest(is_new_group.flip(0), places).flip(0)
    # Places count across all days; a day starts at the number of samples of earlier days.
    day_start = _latest(is_new_day, places)
    rank = (first + last).double() / 2 - day_start + 1.0
    return torch.empty_like(rank).index_copy_(0, order, rank)


def _sort_keys(values: Tensor) -> Tensor:
    """Return int64 numbers in the order of `values` (no NaN), equal ones for equal values.

    A CPU sorts many integers by their digits, in a fifth of the time that floats take.
    """
    bits = (values.double() + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _latest(is_start: Tensor, places: Tensor) -> Tensor:
    """Return the latest start at or before each of `places [S]`; the first place is one.

    `is_start [S - 1]` says of the other places whether they are a start.
    """
    starts = torch.zeros_like(places)
    starts[1:] = torch.where(is_start, places[1:], 0)
    return torch.cummax(starts, 0).values


class _Days:
    """Sums over the samples of each day; `day [S]` is sorted.

    The order of each sum is that of the samples. (`index_add_` on a GPU adds in any order, so that
    the same training twice would have different metrics.)
    """

    def __init__(self, day: Tensor, num_days: int) -> None:
        self.day = day
        all_days = torch.arange(num_days + 1, device=day.device)
        self._starts = torch.searchsorted(day, all_days)
        self.count = self._starts.diff().double()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values [S]` of each day, `[num_days]`."""
        # "unsafe" leaves out checks for which the host would wait.
        return torch.segment_reduce(values, "sum", offsets=self._starts, unsafe=True, initial=0.0)

    def of_samples(self, values: Tensor) -> Tensor:
        """Return the value of each sample's day, `[S]`, for `values [num_days]`."""
        return values.index_select(0, self.day)


def _pearson(x: Tensor, y: Tensor, days: _Days) -> Tensor:
    count = days.count.clamp_min(1.0)
    mean_x, mean_y = days.sum(x) / count, days.sum(y) / count
    dx, dy = x - days.of_samples(mean_x), y - days.of_samples(mean_y)
    var_x, var_y = days.sum(dx * dx), days.sum(dy * dy)
    is_constant_x = var_x <= count * (_RELATIVE_SPREAD * mean_x).square()
    is_constant_y = var_y <= count * (_RELATIVE_SPREAD * mean_y).square()
    out = days.sum(dx * dy) / (var_x * var_y).sqrt()
    is_undefined = is_constant_x | is_constant_y | (days.count < 2)
    return torch.where(is_undefined, torch.nan, out.clamp(-1.0, 1.0))
