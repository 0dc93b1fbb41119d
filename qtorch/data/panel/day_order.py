"""The order of the values of each day: ranks, and runs of equal values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_days(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of `values [D, N]`, and return the sorted values and their columns.

    The order of equal values is not defined. NaN sorts last, but slows numpy down.
    """
    if values.device.type != "cpu":
        return values.sort(dim=1)
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1))  # twice as fast as torch's
    return values.gather(1, order), order


def average_ranks(sorted_values: Tensor) -> Tensor:
    """Compute ranks `[D, N]` from 1 for ascending rows; ties get their average rank."""
    d, n = sorted_values.shape
    if sorted_values.device.type != "cpu":
        first, last = scan_runs(sorted_values[:, 1:] != sorted_values[:, :-1])
        return (first + last).double().div_(2).add_(1)
    is_start = torch.ones((d, n), dtype=torch.bool, device=sorted_values.device)
    torch.ne(sorted_values[:, 1:], sorted_values[:, :-1], out=is_start[:, 1:])
    starts = is_start.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_full((1,), d * n))
    ranks = (starts % n).double() + (lengths + 1) / 2
    return ranks.repeat_interleave(lengths, output_size=d * n).reshape(d, n)


def run_bounds(is_change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last position `[D, N]` of the run that each position belongs to.

    `is_change [D, N - 1]` is True between two neighbours of different runs.
    """
    if is_change.device.type != "cpu":
        return scan_runs(is_change)
    d, n = is_change.shape[0], is_change.shape[1] + 1
    is_start = torch.cat([is_change.new_ones(d, 1), is_change], 1)
    starts = is_start.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_full((1,), d * n))
    first = starts % n
    bounds = torch.stack([first, first + lengths - 1])
    first, last = bounds.repeat_interleave(lengths, dim=1, output_size=d * n).reshape(2, d, n)
    return first, last


def scan_runs(is_change: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `run_bounds` returns, by scans: a GPU does not wait for the number of runs."""
    n = is_change.shape[1] + 1
    places = torch.arange(n, device=is_change.device)
    edge = is_change.new_ones(len(is_change), 1)
    starts = torch.where(torch.cat([edge, is_change], 1), places, 0)
    ends = torch.where(torch.cat([is_change, edge], 1), places, n - 1)
    return starts.cummax(1).values, ends.flip(1).cummin(1).values.flip(1)
