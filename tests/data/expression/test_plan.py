from __future__ import annotations

import random

import pytest

from qtorch.data.expression.network import program
from qtorch.data.expression.parser import parse
from qtorch.data.expression.plan import make_plan, window_chain


@pytest.mark.parametrize("overlap", [False, True])
def test_any_set_of_windows_is_built_from_shorter_ones(overlap):
    rng = random.Random(1)
    for _ in range(300):
        windows = [rng.randint(1, 300) for _ in range(rng.randint(1, 7))]
        covered = {1: {0}}  # window -> the lags that it covers
        for link in window_chain(windows, overlap=overlap):
            older = {lag + link.shift for lag in covered[link.older]}
            newer = covered[link.newer]
            assert overlap or not (older & newer)
            covered[link.window] = older | newer
        assert all(covered[w] == set(range(w)) for w in windows)


def test_the_usual_windows_take_seven_additions():
    assert len(window_chain([5, 10, 20, 30, 60])) == 7
    assert len(window_chain([5, 10, 20, 30, 60], overlap=True)) == 7
    assert len(window_chain([252])) <= 12


def test_equal_subexpressions_are_one_step():
    texts = ["Mean($close,5)/$close", "Std($close, 5)/$close", "Mean($close,5) - 1"]
    plan = make_plan([parse(t) for t in texts])
    assert [s.operator for s in plan.steps] == ["Field", "Mean", "Div", "Std", "Div", "Sub"]
    assert plan.windows[(0,), "sum"] == (5,)


def test_windows_of_a_series_are_collected():
    texts = ["Mean($a, 5)", "Std($a, 20)", "Slope($a, 7)", "Corr($a, $b, 9)"]
    plan = make_plan([parse(t) for t in texts])
    assert plan.windows[(0,), "sum"] == (5, 7, 9, 20)
    assert plan.windows[(0,), "square"] == (9, 20)
    assert plan.windows[(0,), "position"] == (7,)


def test_networks_leave_out_what_is_not_wanted():
    one, all_of_them = program(((20, (10,)),)), program(((20, tuple(range(20))),))
    assert len(one.instructions) < len(all_of_them.instructions)
