from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtorch.metrics.ic import ICMeter, daily_ic, ranks


def _scipy_correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    is_valid = ~(np.isnan(x) | np.isnan(y))
    x, y = x[is_valid], y[is_valid]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    return stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
def test_daily_ic_equals_scipy_with_ties_nan_and_ragged_days(
    seed: int, days: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 60))
    day = rng.integers(0, days, size)
    x, y = rng.normal(size=size), rng.normal(size=size)
    if ties:
        x, y = np.round(x), np.round(y * 2)
    x[rng.random(size) < 0.1] = np.nan
    y[rng.random(size) < 0.1] = np.nan
    result = daily_ic(torch.tensor(x), torch.tensor(y), torch.tensor(day), days)
    for d in range(days):
        ic, rank_ic = _scipy_correlations(x[day == d], y[day == d])
        np.testing.assert_allclose(result.ic[d].item(), ic, atol=1e-9, equal_nan=True)
        np.testing.assert_allclose(result.rank_ic[d].item(), rank_ic, atol=1e-9, equal_nan=True)


def test_tied_values_share_their_mean_rank() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, 5.0, 7.0])
    day = torch.tensor([0, 0, 0, 1, 0])
    assert ranks(values, day).tolist() == [2.5, 1.0, 2.5, 1.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_of_many_values_equal_those_of_scipy(dtype: torch.dtype) -> None:
    """So many that torch sorts them by their digits; with both zeros, and infinite values."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40_000)
    values[:20_000] = np.round(values[:20_000], 1)  # with 0.0 and -0.0
    values[::1000], values[1::1000] = np.inf, -np.inf
    values, day = torch.tensor(values, dtype=dtype), torch.tensor(rng.integers(0, 5, len(values)))
    result = ranks(values, day)
    for d in range(5):
        assert result[day == d].tolist() == stats.rankdata(values[day == d]).tolist()


def test_constant_score_has_nan_ic_despite_rounding() -> None:
    result = daily_ic(torch.full((7,), 0.1), torch.randn(7), torch.zeros(7, dtype=torch.long), 1)
    assert math.isnan(result.ic.item())
    assert math.isnan(result.rank_ic.item())


def test_large_offsets_keep_the_correlation_accurate() -> None:
    x = torch.arange(10, dtype=torch.float64) + 1e9
    result = daily_ic(x, -x, torch.zeros(10, dtype=torch.long), 1)
    assert result.ic.item() == pytest.approx(-1.0, abs=1e-12)


def test_ic_meter_combines_batches_and_applies_the_mask() -> None:
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(2, 3, 8, generator=g)
    day = torch.arange(3)[:, None].expand(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    meter = ICMeter(num_days=3)
    meter.update(score[:1], label[:1], day[:1], mask[:1])
    meter.update(score[1:], label[1:], day[1:], mask[1:])
    result = meter.compute()
    for d in range(3):
        ic, rank_ic = _scipy_correlations(score[d, mask[d]].numpy(), label[d, mask[d]].numpy())
        assert result.ic[d].item() == pytest.approx(ic, abs=1e-6)
        assert result.rank_ic[d].item() == pytest.approx(rank_ic, abs=1e-6)
    assert result.count.tolist() == [8, 5, 8]
    assert result.mean_ic().item() == pytest.approx(np.mean(result.ic.numpy()))
    meter.reset()
    assert meter.compute().ic.isnan().all()


@pytest.mark.gpu
def test_daily_ic_does_not_synchronise_the_device() -> None:
    score, label = torch.randn(2, 1000, device="cuda")
    day = torch.randint(0, 10, (1000,), device="cuda")
    expected = daily_ic(score.cpu(), label.cpu(), day.cpu(), 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = daily_ic(score, label, day, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.ic.cpu(), expected.ic)
    torch.testing.assert_close(result.rank_ic.cpu(), expected.rank_ic)
