"""Random bars with all kinds of missing data, for the expression tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.panel.panel import Panel


def random_bars(seed: int, *, dates: int = 70, instruments: int = 5, missing: float = 0.2) -> Panel:
    """Create two positive fields with missing values, ties, flat stretches and shortened spans."""
    rng = np.random.default_rng(seed)
    values = np.round(20 + np.cumsum(rng.normal(0, 0.3, (2, dates, instruments)), 1), 2)
    values[0, dates // 3 : dates // 3 + 12, 0] = values[0, dates // 3, 0]
    values[rng.random(values.shape) < missing] = np.nan
    spans = np.tile([0, dates - 1], (instruments, 1))
    for j in range(1, instruments):
        spans[j] = sorted(rng.choice(dates, 2, replace=False))
    for j, (first, last) in enumerate(spans):
        values[:, :first, j] = values[:, last + 1 :, j] = np.nan
    return Panel(
        torch.from_numpy(values.astype(np.float32)).permute(1, 2, 0),
        pd.bdate_range("2020-01-01", periods=dates),
        [f"I{j}" for j in range(instruments)],
        ["x", "y"],
        spans=torch.from_numpy(spans),
    )


@pytest.fixture(name="random_bars")
def random_bars_fixture() -> Callable[..., Panel]:
    return random_bars
