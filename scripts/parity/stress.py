"""A small market with every kind of dirt that rolling windows meet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from qtorch.data.panel import Panel

FIELDS = ("open", "high", "low", "close", "vwap", "volume")


def stress_market(num_instruments: int = 48, num_dates: int = 400, *, seed: int = 7) -> Panel:
    """Bars with missing closes (18%), suspensions, late listings, delistings, flat prices, ties.

    A missing close takes the whole bar along in half of the cases. Some first and last stored
    rows are suspended days; some volumes are zero or missing; prices are rounded to cents.
    """
    rng = np.random.default_rng(seed)
    d, n = num_dates, num_instruments
    close = 20 * np.exp(np.cumsum(rng.standard_t(4, (d, n)) * 0.012, 0))
    spread = np.abs(rng.normal(0, 0.01, (3, d, n)))
    opened = close * (1 + rng.normal(0, 0.008, (d, n)))
    high = np.maximum(opened, close) * (1 + spread[0])
    low = np.minimum(opened, close) * (1 - spread[1])
    volume = np.round(np.exp(rng.normal(12, 1, (d, n))))
    bars = np.stack([opened, high, low, close, (high + low + close) / 3, volume])
    bars[:5] = np.round(bars[:5], 2)
    flat = min(40, d // 4)
    for j in range(0, n, 6):  # a price that does not move, with some volume
        at = rng.integers(0, d - flat)
        bars[:5, at : at + flat, j] = bars[3, at, j]
    bars[5][rng.random((d, n)) < 0.02] = 0
    bars[5, d // 2 : d // 2 + flat, 1::7] = 0
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
    """Missing days, alone and in runs; the first two instruments stay whole."""
    _, d, n = bars.shape
    lonely = rng.random((d, n)) < 0.18
    lonely[:, :2] = False
    bars[3][lonely] = np.nan
    bars[:, lonely & (rng.random((d, n)) < 0.5)] = np.nan
    bars[5][rng.random((d, n)) < 0.03] = np.nan
    for j in range(2, n, 3):
        length = int(rng.integers(10, min(89, d // 4)))
        at = int(rng.integers(0, d - length))
        bars[:, at : at + length, j] = np.nan
