"""Maths over the instruments of a day: z-score, rank, means. Pure functions of `[D, N]` tensors.

Every function takes `values [D, N]` float32 (NaN is missing) and `rows [D, N]` bool: the rows
whose values make the day's statistics. Values outside `rows` are transformed by the same day's
statistics, so that a window may reach over them; a missing value stays missing. A result at date
t has seen date t alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAD_SCALE = 1.4826  # a normal variable's standard deviation over its median absolute deviation
RANK_SCALE = 3.46  # 1 / standard deviation of a uniform variable, as Qlib rounds it
CLIP = 3.0


def day_zscore(values: Tensor, rows: Tensor) -> Tensor:
    """`(x - mean) / std` of the day, std with ddof 1.

    As in Qlib: a day with an infinite value, of one value, or of equal values gives NaN.
    """
    used = rows & ~values.isnan()
    exact = values.double()
    count = used.sum(1, keepdim=True)
    mean = _sum(exact, used) / count
    square = _sum((exact - mean).square(), used)
    std = (square / (count - 1)).sqrt()
    return ((exact - mean) / std.where(count > 1, torch.nan)).to(values.dtype)


def day_robust_zscore(values: Tensor, rows: Tensor) -> Tensor:
    """`(x - median) / (1.4826 * MAD)` of the day, clipped to 3. A MAD of zero gives 3, -3, NaN."""
    centred = values - day_median(values, rows)
    mad = day_median(centred.abs(), rows)
    return (centred / mad / MAD_SCALE).clamp(-CLIP, CLIP)


def day_rank_norm(values: Tensor, rows: Tensor) -> Tensor:
    """`(rank / count - 0.5) * 3.46` of the day, ties by their average rank.

    A value outside `rows` gets the rank that it would have between those of the day; NaN where the
    day has none.
    """
    used = rows & ~values.isnan()
    count = used.sum(1, keepdim=True)
    # What is not ranked sorts behind; it ties with +inf, which is therefore ranked by itself.
    key = values.masked_fill(~used, torch.inf)
    ordered, order = key.sort(dim=1)
    ranks = torch.empty_like(values).scatter_(1, order, _average_ranks(ordered).to(values.dtype))
    largest = used & key.isposinf()
    smaller = count - largest.sum(1, keepdim=True)
    ranks = torch.where(largest, ((smaller + count + 1) / 2).to(ranks.dtype), ranks)
    ranks = _rank_outside(ranks, values, used, ordered)
    count = count.where(count > 0, torch.nan)
    return ((ranks.double() / count - 0.5) * RANK_SCALE).to(values.dtype)


def day_mean_fill(values: Tensor, rows: Tensor) -> Tensor:
    """Missing values replaced by the day's mean; NaN where the day has no value."""
    used = rows & ~values.isnan()
    mean = (_sum(values.double(), used) / used.sum(1, keepdim=True)).to(values.dtype)
    return torch.where(values.isnan(), mean, values)


def day_finite_mean(values: Tensor, rows: Tensor) -> Tensor:
    """`[D]`: the mean of the day's values that are neither missing nor infinite."""
    used = rows & values.isfinite()
    return (_sum(values.double(), used)[:, 0] / used.sum(1)).to(values.dtype)


def day_median(values: Tensor, rows: Tensor) -> Tensor:
    """`[D, 1]`: the day's median, the middle two averaged; NaN for a day without values."""
    used = rows & ~values.isnan()
    ordered = values.masked_fill(~used, torch.nan).sort(dim=1).values
    count = used.sum(1, keepdim=True)
    low = ordered.gather(1, ((count - 1) // 2).clamp(min=0))
    high = ordered.gather(1, (count // 2).clamp(max=values.shape[1] - 1))
    middle = torch.where(low == high, low, (low.double() + high.double()).div(2).to(values.dtype))
    return middle.masked_fill(count == 0, torch.nan)


def _sum(values: Tensor, used: Tensor) -> Tensor:
    return values.masked_fill(~used, 0).sum(1, keepdim=True)


def _average_ranks(ordered: Tensor) -> Tensor:
    """Ranks `[D, N]` from 1 of ascending rows; equal values share their average."""
    d, n = ordered.shape
    place = torch.arange(n, device=ordered.device).expand(d, n)
    tied = ordered[:, 1:] == ordered[:, :-1]
    if not bool(tied.any()):
        return place + 1
    edge = torch.ones(d, 1, dtype=torch.bool, device=ordered.device)
    starts, ends = torch.cat([edge, ~tied], 1), torch.cat([~tied, edge], 1)
    first = place.where(starts, torch.zeros_like(place)).cummax(1).values
    last = place.where(ends, torch.full_like(place, n)).flip(1).cummin(1).values.flip(1)
    return (first + last).double().div_(2).add_(1)


def _rank_outside(ranks: Tensor, values: Tensor, used: Tensor, ordered: Tensor) -> Tensor:
    """The ranks with those of values outside the rows: midway between their neighbours."""
    ranks = ranks.masked_fill(~used, torch.nan)
    outside = ~used & ~values.isnan()
    days = outside.any(1)
    if not bool(days.any()):
        return ranks
    asked, below = values[days].contiguous(), ordered[days].contiguous()
    count = used[days].sum(1, keepdim=True)
    low = torch.searchsorted(below, asked, side="left").minimum(count)
    high = torch.searchsorted(below, asked, side="right").minimum(count)
    ranks[days] = torch.where(outside[days], (low + high + 1).to(ranks.dtype) / 2, ranks[days])
    return ranks
