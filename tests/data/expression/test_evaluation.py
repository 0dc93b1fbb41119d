"""Evaluation of expressions on panels: results, threads, spans, conditions and operators."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError, ExpressionError
from qtorch.data.expression import evaluate, reach, register_operator, unregister_operator
from qtorch.data.handler.alpha import alpha158, alpha360
from qtorch.data.panel.panel import Panel

TEXTS = ["$x", "Mean($x, 5)/$x", "$x>$y", "Corr($x, $y, 7)", "Ref($x, -2)", "IdxMax($y, 6)"]


def evaluate_column(expression, bars):
    return evaluate([expression], bars).values[:, :, 0]


def test_result_is_a_panel_with_the_same_rows(random_bars):
    bars = random_bars(0)
    panel = evaluate({"A": "$x", "B": "$x*2"}, bars)
    assert panel.fields == ("A", "B")
    assert panel.calendar.equals(bars.calendar)
    assert panel.instruments.equals(bars.instruments)
    assert panel.mask is bars.mask
    assert panel.spans is bars.spans
    assert panel.column("B").is_contiguous()
    assert evaluate("$x+1", bars).fields == ("$x+1",)
    torch.testing.assert_close(panel.column("B"), bars.column("x") * 2, equal_nan=True)


def test_out_may_have_any_strides(random_bars):
    bars = random_bars(1)
    expected = evaluate(TEXTS, bars).values
    d, n, f = expected.shape
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        shape = [(d, n, f)[k] for k in order]
        out = torch.full(shape, 7.0).permute(*np.argsort(order).tolist())
        panel = evaluate(TEXTS, bars, out=out)
        assert panel.values is out
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    with pytest.raises(DataError, match="expected float32"):
        evaluate(TEXTS, bars, out=torch.zeros(2, 2, 2))


def test_results_do_not_depend_on_threads_and_blocks(random_bars):
    bars = random_bars(2, instruments=150, dates=60)
    before = torch.get_num_threads()
    single_thread = evaluate(TEXTS, bars, num_threads=1)
    three_threads = evaluate(TEXTS, bars, num_threads=3)
    assert torch.get_num_threads() == before
    torch.testing.assert_close(
        single_thread.values, three_threads.values, equal_nan=True, rtol=0, atol=0
    )
    part = bars.select(instruments=list(bars.instruments[100:103]))
    torch.testing.assert_close(
        evaluate(TEXTS, part).values,
        single_thread.values[:, 100:103],
        equal_nan=True,
        rtol=1e-5,
        atol=1e-6,
    )
    assert threading.active_count() == 1 or not [
        t for t in threading.enumerate() if t.name.startswith("expression-")
    ]
    with pytest.raises(DataError, match="num_threads"):
        evaluate(TEXTS, bars, num_threads=0)


def test_values_outside_the_spans_are_nan(random_bars):
    bars = random_bars(3, missing=0.1)
    texts = [*TEXTS, "If($x>20, 1, 0)", "$x>1", "($x>1)*1", "Count($x, 5)", "$x**0", "Ref($x, 0)"]
    texts += ["Ref(Mean($x, 5), -3)", "Ref($x>20, 2)", "Mean($x>20, 4)", "EMA($x, 5)", "EMA($x, 0)"]
    texts += ["Quantile($x, 4, 0.5)", "Not($x>20)", "$x!=$y", "Sum($x, 3)", "Delta($x, -2)"]
    values = evaluate(texts, bars).values
    rows = torch.arange(len(bars.calendar))[:, None]
    is_outside = (rows < bars.spans[:, 0]) | (rows > bars.spans[:, 1])
    assert values[is_outside].isnan().all()


def test_conditions_equal_torch_comparisons(random_bars):
    bars = random_bars(4)
    x, y = bars.column("x"), bars.column("y")
    is_inside = bars.mask
    expected = {
        "$x>$y": x > y,
        "$x!=$y": x != y,  # NaN is not equal to anything
        "20<=$x": x >= 20,
        "($x>20)&~($y>20)": (x > 20) & ~(y > 20),
        "Or(Lt($x, 20), Eq($y, 20))": (x < 20) | (y == 20),
        "If($x>$y, $x, -1)": torch.where(x > y, x, -torch.ones_like(x)),
    }
    for text, values in expected.items():
        result = evaluate_column(text, bars)
        torch.testing.assert_close(
            result[is_inside], values[is_inside].float(), equal_nan=True, msg=text
        )


def test_mean_of_a_condition_counts_suspended_days(random_bars):
    """A comparison with NaN is false, not missing: the mean divides by all rows of the window."""
    bars = random_bars(5, missing=0.4)
    mean = evaluate_column("Mean($x>20, 4)", bars)[3:, 0]
    is_above = (bars.column("x")[:, 0] > 20).float()
    torch.testing.assert_close(mean, is_above.unfold(0, 4, 1).mean(-1))


def test_ema_over_all_history_equals_a_hand_computed_case():
    """EMA(x, 0) gives lag k the weight (1 - 2/(1 + L)) ** k in the L-th row since the first."""
    values = torch.tensor([[float("nan")], [2.0], [4.0], [float("nan")], [1.0]])[:, :, None]
    bars = Panel(
        values, pd.bdate_range("2020-01-01", periods=5), ["a"], ["x"], spans=torch.tensor([[1, 4]])
    )
    expected = [float("nan"), 2.0]
    for length, rows in ((2, [2, 4]), (3, [2, 4, 0]), (4, [2, 4, 0, 1])):
        weights = (1 - 2 / (1 + length)) ** np.arange(length)[::-1]
        expected.append(float((weights / weights.sum() * rows).sum()))
    np.testing.assert_allclose(evaluate_column("EMA($x, 0)", bars)[:, 0], expected, rtol=1e-6)


def test_mask_uses_the_values_of_another_instrument(random_bars):
    bars = random_bars(6)
    for text in ("Mask($x, 'I0')", "ChangeInstrument('i0', $x)"):
        result = evaluate_column(text, bars)
        expected = bars.column("x")[:, :1].expand_as(result)
        torch.testing.assert_close(
            result[bars.mask], expected[bars.mask], equal_nan=True, rtol=0, atol=0
        )
    masked_mean = evaluate_column("Mean(Mask($x, 'I0'), 3)", bars)
    own_mean = evaluate_column("Mean($x, 3)", bars)[:, :1].expand_as(masked_mean)
    torch.testing.assert_close(masked_mean[bars.mask], own_mean[bars.mask], equal_nan=True)
    with pytest.raises(ExpressionError, match="unknown instrument 'J0'"):
        evaluate_column("Mask($x, 'J0')", bars)


def test_unknown_field_raises_with_the_nearest_name(random_bars):
    bars = random_bars(7)
    price_bars = Panel(bars.values, bars.calendar, bars.instruments, ["close", "open"])
    with pytest.raises(ExpressionError) as error_info:
        evaluate(["Mean($clsoe, 5)"], price_bars)
    assert "Did you mean 'close'" in str(error_info.value)
    assert str(error_info.value).splitlines()[2].strip() == "^" * len("$clsoe")
    assert evaluate(["$CLOSE"], price_bars).values.shape[2] == 1


def test_user_defined_operator(random_bars):
    bars = random_bars(8, instruments=70)

    @register_operator("Spread", arguments=("series", "series", "window"))
    def spread(left, right, window):
        assert left.shape == right.shape
        return left - right / window

    try:
        result = evaluate_column("Spread($x, Mean($y, 3), 4)*2", bars)
        expected = (evaluate_column("$x", bars) - evaluate_column("Mean($y, 3)", bars) / 4) * 2
        torch.testing.assert_close(result, expected, equal_nan=True)
        assert reach("Spread($x, $y, 4)") == (3, 0)
        register_operator(
            "Spread",
            lambda left, right, window: left.sum(),
            replace=True,
            arguments=("series", "series", "window"),
        )
        with pytest.raises(ExpressionError, match="'Spread' returned"):
            evaluate_column("Spread($x, $y, 4)", bars)
    finally:
        unregister_operator("Spread")


def test_an_error_in_a_thread_is_raised_in_the_caller(random_bars):
    register_operator("Broken", lambda x: 1 / 0, arguments=("series",))
    try:
        with pytest.raises(ZeroDivisionError):
            evaluate(["Broken($x)"], random_bars(0), num_threads=2)
    finally:
        unregister_operator("Broken")


@pytest.mark.parametrize(
    "text",
    ["Mean(Ref($x, 2), 5)", "Ref(Std($x, 4), -3)", "Corr($x, Ref($y, -1), 6)", "Delta($x, -2)"],
)
def test_values_depend_on_exactly_the_rows_within_the_reach(random_bars, text):
    """Changing rows outside the reach has no effect; changing the first or last row inside has."""
    bars = random_bars(9, missing=0.0)
    values = torch.rand(bars.shape, generator=torch.Generator().manual_seed(0)) + 1
    bars = Panel(values, bars.calendar, bars.instruments, bars.fields)
    before, after = reach(text)
    row = 40
    outside_changed = bars.values.clone()
    outside_changed[: row - before] *= 3
    outside_changed[row + after + 1 :] *= 3
    changed_bars = Panel(outside_changed, bars.calendar, bars.instruments, bars.fields)
    torch.testing.assert_close(
        evaluate_column(text, bars)[row], evaluate_column(text, changed_bars)[row]
    )
    for edge in (row - before, row + after):
        if edge != row or before == after == 0:
            edge_changed = bars.values.clone()
            edge_changed[edge] *= 3
            changed_bars = Panel(edge_changed, bars.calendar, bars.instruments, bars.fields)
            assert not torch.allclose(
                evaluate_column(text, bars)[row], evaluate_column(text, changed_bars)[row]
            )


def test_empty_and_tiny_panels(random_bars):
    bars = random_bars(0)
    assert evaluate(TEXTS, bars.select(instruments=[])).shape == (70, 0, 6)
    single_day = bars.select(start=bars.calendar[0], end=bars.calendar[0])
    assert evaluate(TEXTS, single_day).shape == (1, 5, 6)
    empty_bars = Panel(
        torch.full((3, 1, 6), float("nan")),
        bars.calendar[:3],
        ["a"],
        ["open", "high", "low", "close", "vwap", "volume"],
    )
    expressions, names = alpha158()
    assert evaluate(dict(zip(names, expressions, strict=True)), empty_bars).values.isnan().all()


@pytest.mark.gpu
def test_gpu_results_equal_cpu_results():
    from scripts.parity.expressions import operator_expressions
    from scripts.parity.stress import stress_market

    bars = stress_market(16, 150)
    texts = operator_expressions() + alpha158()[0] + alpha360()[0][:30]
    texts = list(dict.fromkeys(texts))
    cpu, gpu = evaluate(texts, bars), evaluate(texts, bars.to("cuda"))
    assert gpu.device.type == "cuda"
    for k, text in enumerate(texts):
        x, y = cpu.values[:, :, k], gpu.values[:, :, k].cpu()
        scale = x[x.isfinite()].std() if x.isfinite().any() else torch.tensor(0.0)
        # The logarithm of a GPU rounds otherwise, which is more in a slope of logarithms.
        is_close = (x - y).abs() <= 1e-4 * x.abs() + 1e-5 * scale
        is_equal = (x == y) | (x.isnan() & y.isnan()) | is_close
        assert is_equal.float().mean() >= 0.999, text


@pytest.mark.gpu
def test_gpu_waits_for_nothing_but_the_copy_of_its_results():
    from scripts.parity.stress import stress_market

    bars, (texts, names) = stress_market(16, 150), alpha158()
    features, on_device = dict(zip(names, texts, strict=True)), bars.to("cuda")
    features |= {"rank": "CSRank(Mean($close, 5))", "scale": "CSZScore($close)"}
    on_device.spans = bars.spans  # the host decides by them
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = evaluate(features, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_gpu_computes_blocks_that_fit_and_copies_them_to_the_host(monkeypatch, order):
    from qtorch.data.expression import evaluation as engine
    from scripts.parity.stress import stress_market

    bars = stress_market(30, 100)
    texts = ["Mean($close, 5)", "Std($close, 5)", "Ref($close, 2)", "$close>$open"]
    texts += ["CSRank(Mean($close, 3))"] if order[0] == 0 else []
    cpu = evaluate(texts, bars).values
    widths, run = [], engine.DeviceExecutor.run

    def run_narrow(self, out, rows=None):
        widths.append(out.shape[1])
        if out.shape[1] > 8:
            raise torch.OutOfMemoryError
        run(self, out, rows)

    monkeypatch.setattr(engine.DeviceExecutor, "run", run_narrow)
    monkeypatch.setattr(engine._DeviceEvaluation, "block_width", lambda self: 15)
    shape = [cpu.shape[k] for k in order]
    out = torch.empty(shape).permute(*np.argsort(order).tolist())
    panel = evaluate(texts, bars, out=out, device="cuda")
    assert panel.values is out
    assert max(widths) == 15
    torch.testing.assert_close(out, cpu, rtol=1e-5, atol=1e-6, equal_nan=True)
    rows = evaluate(texts, bars, device="cuda", rows=slice(10, 60)).values
    torch.testing.assert_close(rows, out[10:60], rtol=1e-6, atol=1e-7, equal_nan=True)
