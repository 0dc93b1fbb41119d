"""Evaluation plans: chains of windows, shared subexpressions and sorting networks."""

from __future__ import annotations

import random

import pytest

from qtorch.data.expression.parser import parse
from qtorch.data.expression.plan import make_plan
from qtorch.data.expression.quantile import build_program
from qtorch.data.expression.series import window_chain


@pytest.mark.parametrize("overlap", [False, True])
def test_window_chain_builds_windows_from_shorter_ones(overlap):
    rng = random.Random(1)
    for _ in range(300):
        windows = [rng.randint(1, 300) for _ in range(rng.randint(1, 7))]
        window_lags = {1: {0}}  # window -> the lags in it
        for link in window_chain(windows, overlap=overlap):
            older = {lag + link.shift for lag in window_lags[link.older]}
            newer = window_lags[link.newer]
            assert overlap or not (older & newer)
            window_lags[link.window] = older | newer
        assert all(window_lags[w] == set(range(w)) for w in windows)


def test_common_windows_need_seven_additions():
    assert len(window_chain([5, 10, 20, 30, 60])) == 7
    assert len(window_chain([5, 10, 20, 30, 60], overlap=True)) == 7
    assert len(window_chain([252])) <= 12


def test_equal_subexpressions_share_a_step():
    texts = ["Mean($close,5)/$close", "Std($close, 5)/$close", "Mean($close,5) - 1"]
    plan = make_plan([parse(t) for t in texts])
    assert [s.operator for s in plan.steps] == ["Field", "Mean", "Div", "Std", "Div", "Sub"]
    assert plan.windows[(0,), "sum"] == (5,)


def test_plan_collects_the_windows_of_each_series():
    texts = ["Mean($a, 5)", "Std($a, 20)", "Slope($a, 7)", "Corr($a, $b, 9)"]
    plan = make_plan([parse(t) for t in texts])
    assert plan.windows[(0,), "sum"] == (5, 7, 9, 20)
    assert plan.windows[(0,), "square"] == (9, 20)
    assert plan.windows[(0,), "position"] == (7,)


def test_sorting_networks_omit_unneeded_comparisons():
    single_rank, all_ranks = build_program(((20, (10,)),)), build_program(((20, tuple(range(20))),))
    assert len(single_rank.instructions) < len(all_ranks.instructions)
