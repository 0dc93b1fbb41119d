"""Runs of equal values in the order of a day."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtorch.data.panel.day_order import average_ranks, run_bounds, scan_runs


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_runs_by_scans_are_those_by_counts(num_days, num_instruments, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (num_days, num_instruments), generator=generator).sort(1).values
    is_change = values[:, 1:] != values[:, :-1]
    for actual, expected in zip(scan_runs(is_change), run_bounds(is_change), strict=True):
        assert torch.equal(actual, expected)
    first, last = scan_runs(is_change)
    ranks = (first + last).double() / 2 + 1
    assert torch.equal(ranks, average_ranks(values))
