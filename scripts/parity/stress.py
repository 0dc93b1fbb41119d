"""A small market with every kind of irregular data that rolling windows must handle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from qtorch.data.panel.panel import Panel

FIELDS = ("open", "high", "low", "close", "vwap", "volume")


def stress_market(num_instruments: int = 48, num_dates: int = 400, *, seed: int = 7) -> Panel:
    """Bars with missing closes (18%), suspensions, late listings, delistings, flat prices, ties.

    In half of the cases a missing close means that the whole bar is missing. Some of the first and
    last stored rows are suspended days; some volumes are zero or missing; prices are rounded to
    cents.
    """
    rng = np.random.default_rng(seed)
    d, n = num_dates, num_instruments
    close = 20 * np.exp(np.cumsum(rng.standard_t(4, (d, n)) * 0.012, 0))
    spread = np.abs(rng.normal(0, 0.01, (3, d, n)))
    open_price = close * (1 + rng.normal(0, 0.008, (d, n)))
    high = np.maximum(open_price, close) * (1 + spread[0])
    low = np.minimum(open_price, close) * (1 - spread[1])
    volume = np.round(np.exp(rng.normal(12, 1, (d, n))))
    bars = np.stack([open_price, high, low, close, (high + low + close) / 3, volume])
    bars[:5] = np.round(bars[:5], 2)
    flat_days = min(40, d // 4)
    for j in range(0, n, 6):  # a constant price, with some volume
        start = rng.integers(0, d - flat_days)
        bars[:5, start : start + flat_days, j] = bars[3, start, j]
    bars[5][rng.random((d, n)) < 0.02] = 0
    bars[5, d // 2 : d // 2 + flat_days, 1::7] = 0
    _suspend(bars, rng)
    spans = torch.tensor([[0, d - 1]]).repeat(n, 1)
    for j in range(n):
        if j % 5 == 1:
            spans[j, 0] = int(rng.integers(1, d // 2))
        if j % 7 == 2:
            spans[j, 1] = int(rng.integers(d // 2, d - 1))
        first, last = spans[j].tolist()
        if j % 4 == 3:  # stored, but suspended
            bars[:, first : first + int(rng.integers(1, 8)), j] = np.nan
            bars[:, last - int(rng.integers(0, 5)) : last + 1, j] = np.nan
        bars[:, :first, j] = np.nan
        bars[:, last + 1 :, j] = np.nan
    values = torch.from_numpy(bars.astype(np.float32)).permute(1, 2, 0)
    names = [f"STR{j:03d}" for j in range(n)]
    calendar = pd.bdate_range("2015-01-01", periods=d)
    return Panel(values, calendar, names, FIELDS, spans=spans)


def _suspend(bars: np.ndarray, rng: np.random.Generator) -> None:
    """Remove single days and longer runs of days; the first two instruments stay complete."""
    _, d, n = bars.shape
    is_missing = rng.random((d, n)) < 0.18
    is_missing[:, :2] = False
    bars[3][is_missing] = np.nan
    bars[:, is_missing & (rng.random((d, n)) < 0.5)] = np.nan
    bars[5][rng.random((d, n)) < 0.03] = np.nan
    for j in range(2, n, 3):
        length = int(rng.integers(10, min(89, d // 4)))
        start = int(rng.integers(0, d - length))
        bars[:, start : start + length, j] = np.nan
