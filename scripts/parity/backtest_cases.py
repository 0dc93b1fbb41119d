"""The settings and scores on which our backtest and Qlib's are compared."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

GRID: dict[str, tuple[Any, ...]] = {
    "topk": (10, 30, 50),
    "n_drop": (1, 5),
    "costs": ("none", "benchmark"),
    "limit_threshold": (None, 0.095),
    "hold_thresh": (1, 5),
    "trade_unit": (None, 100),
    "only_tradable": (False, True),
    "forbid_all_trade_at_limit": (True, False),
    "deal_price": ("close", "open"),
}
COSTS = {
    "none": {"open_cost": 0.0, "close_cost": 0.0, "min_cost": 0.0},
    "benchmark": {"open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5.0},
}
STRATEGY = ("topk", "n_drop", "hold_thresh", "only_tradable", "forbid_all_trade_at_limit")

Case = dict[str, Any]


def cases(count: int = 36, seed: int = 0, topk: tuple[int, ...] = (10, 30, 50)) -> list[Case]:
    """Settings of the grid, such that every pair of values of two of them occurs together."""
    grid = {**GRID, "topk": topk}
    random = np.random.default_rng(seed)
    wanted = _pairs(grid)
    found: list[Case] = []
    while len(found) < count:
        tries = [{k: v[random.integers(len(v))] for k, v in grid.items()} for _ in range(60)]
        best = max(tries, key=lambda c: len(wanted & _pairs_of(c)))
        wanted -= _pairs_of(best)
        found.append(best)
    assert not wanted, f"{len(wanted)} pairs are not covered by {count} cases"
    return found


def _pairs(grid: dict[str, tuple[Any, ...]]) -> set[Any]:
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(grid, 2)
        for x in grid[a]
        for y in grid[b]
    }


def _pairs_of(case: Case) -> set[Any]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(case, 2)}


def strategy_kwargs(case: Case) -> dict[str, Any]:
    """The arguments of TopkDropoutStrategy but the signal."""
    return {k: case[k] for k in STRATEGY}


def exchange_kwargs(case: Case) -> dict[str, Any]:
    """The arguments of the exchange, Qlib's names."""
    rest = {k: case[k] for k in ("limit_threshold", "trade_unit", "deal_price")}
    return {**rest, **COSTS[case["costs"]]}


def scores(calendar: pd.DatetimeIndex, instruments: list[str], seed: int = 0) -> pd.Series:
    """Scores that drift slowly and are noisy, with rows and one whole day missing."""
    random = np.random.default_rng(seed)
    shape = (len(calendar), len(instruments))
    slow = np.cumsum(random.standard_normal(shape), axis=0) / 4
    values = slow + random.standard_normal(shape)
    there = random.random(shape) > 0.03
    there[len(calendar) // 2] = False
    at = np.argwhere(there)
    index = pd.MultiIndex.from_arrays(
        [calendar[at[:, 0]], [instruments[k] for k in at[:, 1]]], names=["datetime", "instrument"]
    )
    return pd.Series(values[there], index=index, name="score")
