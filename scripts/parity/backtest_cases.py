"""Settings and scores for comparing qtorch's backtest with Qlib's."""

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
    """Settings from the grid such that every pair of values of two settings occurs together."""
    grid = {**GRID, "topk": topk}
    random = np.random.default_rng(seed)
    uncovered_pairs = _grid_pairs(grid)
    selected_cases: list[Case] = []
    while len(selected_cases) < count:
        candidates = [{k: v[random.integers(len(v))] for k, v in grid.items()} for _ in range(60)]
        best = max(candidates, key=lambda c: len(uncovered_pairs & _case_pairs(c)))
        uncovered_pairs -= _case_pairs(best)
        selected_cases.append(best)
    assert not uncovered_pairs, f"{len(uncovered_pairs)} pairs are not covered by {count} cases"
    return selected_cases


def _grid_pairs(grid: dict[str, tuple[Any, ...]]) -> set[Any]:
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(grid, 2)
        for x in grid[a]
        for y in grid[b]
    }


def _case_pairs(case: Case) -> set[Any]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(case, 2)}


def strategy_kwargs(case: Case) -> dict[str, Any]:
    """The arguments of TopkDropoutStrategy except the signal."""
    return {k: case[k] for k in STRATEGY}


def exchange_kwargs(case: Case) -> dict[str, Any]:
    """The arguments of the exchange, under Qlib's names."""
    kwargs = {k: case[k] for k in ("limit_threshold", "trade_unit", "deal_price")}
    return {**kwargs, **COSTS[case["costs"]]}


def scores(calendar: pd.DatetimeIndex, instruments: list[str], seed: int = 0) -> pd.Series:
    """Noisy scores that drift slowly, with some rows and one whole day missing."""
    random = np.random.default_rng(seed)
    shape = (len(calendar), len(instruments))
    trend = np.cumsum(random.standard_normal(shape), axis=0) / 4
    values = trend + random.standard_normal(shape)
    exists = random.random(shape) > 0.03
    exists[len(calendar) // 2] = False
    positions = np.argwhere(exists)
    index = pd.MultiIndex.from_arrays(
        [calendar[positions[:, 0]], [instruments[k] for k in positions[:, 1]]],
        names=["datetime", "instrument"],
    )
    return pd.Series(values[exists], index=index, name="score")
