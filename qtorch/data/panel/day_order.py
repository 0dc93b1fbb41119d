"""The order of the values of each day: ranks, and runs of equal values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_days(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of `values [D, N]`, NaN last, and return the sorted values and their columns.

    The order of equal values is not defined.
    """
    if values.device.type != "cpu":
        return values.sort(dim=1)
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1))  # twice as fast as torch's
    return values.gather(1, order), order


def average_ranks(sorted_values: Tensor) -> Tensor:
    """Compute ranks `[D, N]` from 1 for ascending rows; ties get their average rank."""
    d, n = sorted_values.shape
    is_tied = sorted_values[:, 1:] == sorted_values[:, :-1]
    if not bool(is_tied.any()):
        return torch.arange(1, n + 1, device=sorted_values.device).expand(d, n)
    first, last = run_bounds(~is_tied)
    return (first + last).double().div_(2).add_(1)


def run_bounds(is_change: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last position `[D, N]` of the run that each position belongs to.

    `is_change [D, N - 1]` is True between two neighbours of different runs.
    """
    d, n = is_change.shape[0], is_change.shape[1] + 1
    position = torch.arange(n, device=is_change.device).expand(d, n)
    true = torch.ones(d, 1, dtype=torch.bool, device=is_change.device)
    starts, ends = torch.cat([true, is_change], 1), torch.cat([is_change, true], 1)
    first = position.where(starts, torch.zeros_like(position)).cummax(1).values
    last = position.where(ends, torch.full_like(position, n)).flip(1).cummin(1).values.flip(1)
    return first, last
