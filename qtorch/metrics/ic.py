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
    x = torch.where(valid, score, 0.0).double()
    y = torch.where(valid, label, 0.0).double()
    buckets = num_days + 1
    count = _day_sum(valid.double(), day, buckets)
    ic = _pearson(x, y, day, count)
    rank_ic = _pearson(ranks(x, day, buckets), ranks(y, day, buckets), day, count)
    return DailyIC(ic[:num_days], rank_ic[:num_days], count[:num_days])


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


def ranks(values: Tensor, day: Tensor, num_days: int) -> Tensor:
    """Rank of each of `values [S]` within its day, starting at 1; ties get their mean rank."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(day[order], stable=True)]
    sorted_day, sorted_values = day[order], values[order]
    is_new_group = torch.ones_like(sorted_day, dtype=torch.bool)
    is_new_group[1:] = (sorted_day[1:] != sorted_day[:-1]) | (
        sorted_values[1:] != sorted_values[:-1]
    )
    group = torch.cumsum(is_new_group, 0) - 1  # number of each group of equal values
    position = torch.arange(len(values), dtype=torch.float64, device=values.device)
    size = torch.zeros_like(position).index_add_(0, group, torch.ones_like(position))
    total = torch.zeros_like(position).index_add_(0, group, position)
    # Positions count across all days; a day starts at the number of samples of earlier days.
    per_day = torch.zeros(num_days, dtype=torch.float64, device=values.device)
    per_day.index_add_(0, day, torch.ones_like(position))
    day_start = torch.cumsum(per_day, 0) - per_day
    rank = (total / size)[group] - day_start[sorted_day] + 1.0
    return torch.empty_like(rank).index_copy_(0, order, rank)


def _pearson(x: Tensor, y: Tensor, day: Tensor, count: Tensor) -> Tensor:
    buckets = len(count)
    safe_count = count.clamp_min(1.0)
    mean_x, mean_y = _day_sum(x, day, buckets) / safe_count, _day_sum(y, day, buckets) / safe_count
    dx, dy = x - mean_x[day], y - mean_y[day]
    var_x, var_y = _day_sum(dx * dx, day, buckets), _day_sum(dy * dy, day, buckets)
    is_constant_x = var_x <= safe_count * (_RELATIVE_SPREAD * mean_x).square()
    is_constant_y = var_y <= safe_count * (_RELATIVE_SPREAD * mean_y).square()
    out = _day_sum(dx * dy, day, buckets) / (var_x * var_y).sqrt()
    return torch.where(is_constant_x | is_constant_y | (count < 2), torch.nan, out.clamp(-1.0, 1.0))


def _day_sum(values: Tensor, day: Tensor, buckets: int) -> Tensor:
    return torch.zeros(buckets, dtype=values.dtype, device=values.device).index_add_(0, day, values)
