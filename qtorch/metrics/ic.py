"""Information coefficients on tensors: per day, on the device, no value read on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A spread below this share of the values' size is the rounding of the mean, not a spread.
_RELATIVE_SPREAD = 1e-13


@dataclass(frozen=True)
class DailyIC:
    """IC and Rank IC of each day, `[D]` float64, NaN where a day has none; `count [D]` pairs."""

    ic: Tensor
    rank_ic: Tensor
    count: Tensor

    def mean_ic(self) -> Tensor:
        """Mean IC over the days that have one: a float64 scalar on the device."""
        return torch.nanmean(self.ic)

    def mean_rank_ic(self) -> Tensor:
        """Mean Rank IC over the days that have one."""
        return torch.nanmean(self.rank_ic)

    def merged(self, add: Callable[[Tensor], Tensor]) -> DailyIC:
        """With the days that others know: `add` sums a tensor over all of them. A day is known to
        one of them alone, so that nothing changes by it."""
        pair = torch.stack((self.ic, self.rank_ic))
        known = ~pair.isnan()
        found = add(torch.cat((pair.nan_to_num(), known.double(), self.count.double()[None])))
        pair = found[:2].masked_fill(found[2:4] == 0, torch.nan)
        return DailyIC(pair[0], pair[1], found[4])


def daily_ic(
    score: Tensor, label: Tensor, day: Tensor, num_days: int, mask: Tensor | None = None
) -> DailyIC:
    """Pearson and Spearman correlation of `score [S]` and `label [S]` within each day.

    `day [S]` holds numbers in [0, num_days). Pairs with a NaN or a False in `mask` are left out.
    Ties share their mean rank. A day with fewer than two pairs, or on which one side is constant,
    has NaN. Sums are float64. Nothing waits for the device.
    """
    valid = ~(torch.isnan(score) | torch.isnan(label))
    if mask is not None:
        valid = valid & mask
    # What does not count goes to a day of its own, so that every shape is known beforehand.
    day = torch.where(valid, day, num_days)
    x = torch.where(valid, score, 0.0).double()
    y = torch.where(valid, label, 0.0).double()
    buckets = num_days + 1
    count = _day_sum(valid.double(), day, buckets)
    ic = _pearson(x, y, day, count)
    rank_ic = _pearson(ranks(x, day, buckets), ranks(y, day, buckets), day, count)
    return DailyIC(ic[:num_days], rank_ic[:num_days], count[:num_days])


def ranks(values: Tensor, day: Tensor, num_days: int) -> Tensor:
    """Rank of each of `values [S]` within its day, from 1; ties share their mean rank."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(day[order], stable=True)]
    sorted_day, sorted_values = day[order], values[order]
    new = torch.ones_like(sorted_day, dtype=torch.bool)
    new[1:] = (sorted_day[1:] != sorted_day[:-1]) | (sorted_values[1:] != sorted_values[:-1])
    tie = torch.cumsum(new, 0) - 1  # number of the group of equal values
    place = torch.arange(len(values), dtype=torch.float64, device=values.device)
    size = torch.zeros_like(place).index_add_(0, tie, torch.ones_like(place))
    total = torch.zeros_like(place).index_add_(0, tie, place)
    # Places count through all days; a day's first place is the number of samples before it.
    per_day = torch.zeros(num_days, dtype=torch.float64, device=values.device)
    per_day.index_add_(0, day, torch.ones_like(place))
    before = torch.cumsum(per_day, 0) - per_day
    rank = (total / size)[tie] - before[sorted_day] + 1.0
    return torch.empty_like(rank).index_copy_(0, order, rank)


def _day_sum(values: Tensor, day: Tensor, buckets: int) -> Tensor:
    return torch.zeros(buckets, dtype=values.dtype, device=values.device).index_add_(0, day, values)


def _pearson(x: Tensor, y: Tensor, day: Tensor, count: Tensor) -> Tensor:
    buckets = len(count)
    some = count.clamp_min(1.0)
    mean_x, mean_y = _day_sum(x, day, buckets) / some, _day_sum(y, day, buckets) / some
    dx, dy = x - mean_x[day], y - mean_y[day]
    var_x, var_y = _day_sum(dx * dx, day, buckets), _day_sum(dy * dy, day, buckets)
    flat_x = var_x <= some * (_RELATIVE_SPREAD * mean_x).square()
    flat_y = var_y <= some * (_RELATIVE_SPREAD * mean_y).square()
    out = _day_sum(dx * dy, day, buckets) / (var_x * var_y).sqrt()
    return torch.where(flat_x | flat_y | (count < 2), torch.nan, out.clamp(-1.0, 1.0))


class ICMeter:
    """Collects scores batch by batch and gives IC and Rank IC of all of them at the end.

    Ranks need whole days, so it keeps what it is given (on the device) until `compute`.
    """

    def __init__(self, num_days: int) -> None:
        self.num_days = num_days
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forget everything."""
        self._parts.clear()

    def update(self, score: Tensor, label: Tensor, day: Tensor, mask: Tensor | None = None) -> None:
        """Take a batch: tensors of one shape, `[B]` or `[G, N]`."""
        keep = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
        found = score.detach().float()
        self._parts.append(
            (found.reshape(-1), label.reshape(-1), day.reshape(-1), keep.reshape(-1))
        )

    def compute(self) -> DailyIC:
        """Of all batches since `reset`; every day NaN where there were none."""
        if not self._parts:
            nothing = torch.zeros(0)
            return daily_ic(nothing, nothing, nothing.long(), self.num_days)
        score, label, day, mask = (torch.cat(part) for part in zip(*self._parts, strict=True))
        return daily_ic(score, label, day, self.num_days, mask)
