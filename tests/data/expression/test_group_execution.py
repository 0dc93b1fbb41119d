"""The execution in groups, as on a GPU, against the execution step by step."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.expression import evaluate, group_kernels
from qtorch.data.expression import evaluation as engine
from qtorch.data.expression.group_kernels import DeviceExecutor
from qtorch.data.expression.grouped import _regular_runs
from qtorch.data.expression.stacked import Moments, WindowStack, finite_cells, trailing_windows
from qtorch.data.handler.alpha import alpha158
from scripts.parity.expressions import operator_expressions
from scripts.parity.stress import stress_market

# Both sides compute in float64: where a result is not zero up to rounding they agree in all digits
# of float32 but the last.
ROUNDING = 2e-6


@pytest.fixture
def evaluate_in_groups(monkeypatch):
    """A function like `evaluate` that uses the GPU's executor on the CPU."""

    def run(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "Executor", DeviceExecutor)
            return evaluate(*args, **kwargs)

    return run


def assert_equal_columns(actual, expected, texts):
    for k, text in enumerate(texts):
        x, y = expected.values[:, :, k].double(), actual.values[:, :, k].double()
        assert torch.equal(x.isnan(), y.isnan()), text
        scale = x[x.isfinite()].abs().mean() if x.isfinite().any() else 0.0
        torch.testing.assert_close(
            y, x, rtol=ROUNDING, atol=float(scale) * 1e-7, equal_nan=True, msg=text
        )


def test_every_operator_has_the_values_of_the_ordinary_execution(evaluate_in_groups):
    bars = stress_market(16, 150)
    texts = list(dict.fromkeys(operator_expressions() + alpha158()[0]))
    assert_equal_columns(evaluate_in_groups(texts, bars), evaluate(texts, bars), texts)


@pytest.mark.parametrize("seed", range(4))
def test_short_and_broken_series(random_bars, evaluate_in_groups, seed):
    bars = random_bars(seed, dates=9 + 30 * seed, missing=0.3)
    texts = ["Mean($x, 3)", "Mean($x, 7)", "Sum($x>20, 5)", "Std($x, 2)", "Std($y, 60)"]
    texts += ["Corr($x, $y, 4)", "Cov($x, $y, 4)", "Rsquare($x, 0)", "Rsquare($x, 5)"]
    texts += ["Slope($y, 0)", "Resi($x, 4)", "Max($x, 3)", "Min($x, 0)", "Min($y*2, 3)"]
    texts += ["IdxMax($x, 6)", "IdxMin($y, 60)", "Rank($x, 5)", "Rank($x, 300)", "Count($x, 4)"]
    texts += ["Quantile($x, 4, 0.3)", "Quantile($x, 9, 0.8)", "Med($y, 5)", "Ref($x, -2)"]
    texts += ["Ref($x, 2)", "Ref($x, 0)", "Ref($x>20, 1)", "Skew($x, 5)", "Kurt($y, 6)"]
    texts += ["If($x>$y, $x, 1)", "Mean($x, 3)/5", "Mean($x, 7)/7", "Std(Mean($x, 3), 4)"]
    texts += ["WMA($x, 4)", "EMA($y, 3)", "EMA($x, 0)", "Mad($x, 5)", "Delta($x, 2)"]
    texts += ["Mask(Mean($x, 3), 'I1')", "$x", "$x>20", "Max(Mean($x, 2), 3)"]
    assert_equal_columns(evaluate_in_groups(texts, bars), evaluate(texts, bars), texts)
    rows = slice(2, 7)
    part = evaluate_in_groups(texts, bars, rows=rows).values
    whole = evaluate_in_groups(texts, bars).values[rows]
    torch.testing.assert_close(part, whole, rtol=0, atol=0, equal_nan=True)


def test_narrow_moves_of_high_prices_keep_their_digits():
    """Differences of sums lose them; the parts' means do not."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(60_000 + rng.normal(0, 1e-3, (80, 3)))
    x[40:60, 1] = 60_001.0  # flat
    x[20:30, 2] = torch.nan
    rows = torch.arange(80.0, dtype=torch.float64)[:, None].expand(80, 3)
    moments = Moments(x[None], rows[None], (2, 5, 20))
    series = pd.DataFrame(x.numpy() - 60_000)
    for window in (2, 5, 20):
        variance = (moments.squares([0]) * moments.inverse_dof([0]))[
            moments.chain.position(window), 0
        ].numpy()
        expected = series.rolling(window, min_periods=2).var().to_numpy()
        np.testing.assert_allclose(variance[window:], expected[window:], rtol=1e-6, atol=1e-12)
    assert moments.squares([0])[moments.chain.position(20), 0, 59, 1] == 0


def test_windows_of_a_stack_are_clipped_at_the_first_row():
    values = torch.arange(1.0, 13).reshape(1, 6, 2)
    chain = WindowStack((3, 5))
    sums = chain.results(chain.join(values, torch.add, 0.0))
    for window in (3, 5):
        for row in range(6):
            part = values[0, max(0, row - window + 1) : row + 1].sum(0)
            torch.testing.assert_close(sums[chain.position(window), 0, row], part)
    windows = trailing_windows(values, 3, -1.0)
    assert windows[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert windows[0, :, 5, 1].tolist() == [8, 10, 12]
    assert finite_cells(torch.tensor([1.0, torch.inf, torch.nan])).tolist() == [1, 0, 0]


def test_alike_steps_run_together(monkeypatch, random_bars):
    sizes = []
    run_group = DeviceExecutor._run_group

    def count(self, members, out, rows):
        sizes.append(len(members))
        run_group(self, members, out, rows)

    monkeypatch.setattr(DeviceExecutor, "_run_group", count)
    monkeypatch.setattr(engine, "Executor", DeviceExecutor)
    evaluate([f"Mean($x, {w})/$x" for w in (2, 3, 4)], random_bars(0))
    assert sizes == [1, 3, 3]  # the field, the means, the quotients


def test_many_windows_are_sorted_in_parts(monkeypatch, random_bars, evaluate_in_groups):
    texts = ["Quantile($x, 6, 0.3)", "Rank($y, 9)", "Med($x, 4)"]
    bars = random_bars(1, instruments=7)
    whole = evaluate_in_groups(texts, bars).values
    monkeypatch.setattr(group_kernels, "MAX_WINDOW_VALUES", 70 * 9 * 2)
    parts = evaluate_in_groups(texts, bars).values
    torch.testing.assert_close(parts, whole, rtol=0, atol=0, equal_nan=True)


def test_regular_runs():
    pairs = [(0, 4), (1, 6), (2, 8), (3, 9), (5, 10), (6, 9)]
    expected = [(slice(0, 3), slice(4, 9, 2)), (slice(3, 4), slice(9, 10, 1))]
    expected += [(slice(5, 6), slice(10, 11, 1)), (slice(6, 7), slice(9, 10, 1))]
    assert list(_regular_runs(pairs)) == expected
