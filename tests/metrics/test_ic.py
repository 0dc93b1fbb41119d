from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtorch.metrics.ic import ICMeter, daily_ic, ranks


def _by_scipy(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = x[there], y[there]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    return stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
def test_equal_to_scipy_with_ties_holes_and_ragged_days(seed: int, days: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 60))
    day = rng.integers(0, days, size)
    x, y = rng.normal(size=size), rng.normal(size=size)
    if ties:
        x, y = np.round(x), np.round(y * 2)
    x[rng.random(size) < 0.1] = np.nan
    y[rng.random(size) < 0.1] = np.nan
    got = daily_ic(torch.tensor(x), torch.tensor(y), torch.tensor(day), days)
    for d in range(days):
        ic, rank_ic = _by_scipy(x[day == d], y[day == d])
        np.testing.assert_allclose(got.ic[d].item(), ic, atol=1e-9, equal_nan=True)
        np.testing.assert_allclose(got.rank_ic[d].item(), rank_ic, atol=1e-9, equal_nan=True)


def test_ranks_average_ties_within_the_day() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, 5.0, 7.0])
    day = torch.tensor([0, 0, 0, 1, 0])
    assert ranks(values, day, 2).tolist() == [2.5, 1.0, 2.5, 1.0, 4.0]


def test_a_constant_score_has_no_ic_whatever_the_rounding_of_its_mean() -> None:
    got = daily_ic(torch.full((7,), 0.1), torch.randn(7), torch.zeros(7, dtype=torch.long), 1)
    assert math.isnan(got.ic.item())
    assert math.isnan(got.rank_ic.item())


def test_large_offsets_do_not_eat_the_correlation() -> None:
    x = torch.arange(10, dtype=torch.float64) + 1e9
    got = daily_ic(x, -x, torch.zeros(10, dtype=torch.long), 1)
    assert got.ic.item() == pytest.approx(-1.0, abs=1e-12)


def test_the_meter_joins_batches_and_heeds_the_mask() -> None:
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(2, 3, 8, generator=g)
    day = torch.arange(3)[:, None].expand(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    meter = ICMeter(num_days=3)
    meter.update(score[:1], label[:1], day[:1], mask[:1])
    meter.update(score[1:], label[1:], day[1:], mask[1:])
    got = meter.compute()
    for d in range(3):
        ic, rank_ic = _by_scipy(score[d, mask[d]].numpy(), label[d, mask[d]].numpy())
        assert got.ic[d].item() == pytest.approx(ic, abs=1e-6)
        assert got.rank_ic[d].item() == pytest.approx(rank_ic, abs=1e-6)
    assert got.count.tolist() == [8, 5, 8]
    assert got.mean_ic().item() == pytest.approx(np.mean(got.ic.numpy()))
    meter.reset()
    assert meter.compute().ic.isnan().all()


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    score, label = torch.randn(2, 1000, device="cuda")
    day = torch.randint(0, 10, (1000,), device="cuda")
    expected = daily_ic(score.cpu(), label.cpu(), day.cpu(), 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = daily_ic(score, label, day, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.ic.cpu(), expected.ic)
    torch.testing.assert_close(got.rank_ic.cpu(), expected.rank_ic)
