from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError, ExpressionError
from qtorch.data.expression import evaluate, reach, register_operator, unregister_operator
from qtorch.data.features import alpha158, alpha360
from qtorch.data.panel import Panel

TEXTS = ["$x", "Mean($x, 5)/$x", "$x>$y", "Corr($x, $y, 7)", "Ref($x, -2)", "IdxMax($y, 6)"]


def column(expression, bars):
    return evaluate([expression], bars).values[:, :, 0]


def test_the_result_is_a_panel_of_the_same_rows(random_bars):
    bars = random_bars(0)
    found = evaluate({"A": "$x", "B": "$x*2"}, bars)
    assert found.fields == ("A", "B")
    assert found.calendar.equals(bars.calendar)
    assert found.instruments.equals(bars.instruments)
    assert found.mask is bars.mask
    assert found.spans is bars.spans
    assert found.column("B").is_contiguous()
    assert evaluate("$x+1", bars).fields == ("$x+1",)
    torch.testing.assert_close(found.column("B"), bars.column("x") * 2, equal_nan=True)


def test_out_of_any_strides(random_bars):
    bars = random_bars(1)
    expected = evaluate(TEXTS, bars).values
    d, n, f = expected.shape
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        shape = [(d, n, f)[k] for k in order]
        out = torch.full(shape, 7.0).permute(*np.argsort(order).tolist())
        found = evaluate(TEXTS, bars, out=out)
        assert found.values is out
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    with pytest.raises(DataError, match="expected float32"):
        evaluate(TEXTS, bars, out=torch.zeros(2, 2, 2))


def test_threads_and_blocks_change_nothing(random_bars):
    bars = random_bars(2, instruments=150, dates=60)
    before = torch.get_num_threads()
    one = evaluate(TEXTS, bars, num_threads=1)
    three = evaluate(TEXTS, bars, num_threads=3)
    assert torch.get_num_threads() == before
    torch.testing.assert_close(one.values, three.values, equal_nan=True, rtol=0, atol=0)
    part = bars.select(instruments=list(bars.instruments[100:103]))
    torch.testing.assert_close(
        evaluate(TEXTS, part).values, one.values[:, 100:103], equal_nan=True, rtol=1e-5, atol=1e-6
    )
    assert threading.active_count() == 1 or not [
        t for t in threading.enumerate() if t.name.startswith("expression-")
    ]
    with pytest.raises(DataError, match="num_threads"):
        evaluate(TEXTS, bars, num_threads=0)


def test_nothing_lies_outside_the_spans(random_bars):
    bars = random_bars(3, missing=0.1)
    texts = [*TEXTS, "If($x>20, 1, 0)", "$x>1", "($x>1)*1", "Count($x, 5)", "$x**0", "Ref($x, 0)"]
    texts += ["Ref(Mean($x, 5), -3)", "Ref($x>20, 2)", "Mean($x>20, 4)", "EMA($x, 5)", "EMA($x, 0)"]
    texts += ["Quantile($x, 4, 0.5)", "Not($x>20)", "$x!=$y", "Sum($x, 3)", "Delta($x, -2)"]
    values = evaluate(texts, bars).values
    rows = torch.arange(len(bars.calendar))[:, None]
    outside = (rows < bars.spans[:, 0]) | (rows > bars.spans[:, 1])
    assert values[outside].isnan().all()


def test_conditions(random_bars):
    bars = random_bars(4)
    x, y = bars.column("x"), bars.column("y")
    inside = bars.mask
    expected = {
        "$x>$y": x > y,
        "$x!=$y": x != y,  # NaN differs from everything
        "20<=$x": x >= 20,
        "($x>20)&~($y>20)": (x > 20) & ~(y > 20),
        "Or(Lt($x, 20), Eq($y, 20))": (x < 20) | (y == 20),
        "If($x>$y, $x, -1)": torch.where(x > y, x, -torch.ones_like(x)),
    }
    for text, wanted in expected.items():
        found = column(text, bars)
        torch.testing.assert_close(found[inside], wanted[inside].float(), equal_nan=True, msg=text)


def test_suspended_days_count_in_means_of_conditions(random_bars):
    """A comparison with NaN is false, not missing: the mean divides by all rows of the window."""
    bars = random_bars(5, missing=0.4)
    found = column("Mean($x>20, 4)", bars)[3:, 0]
    above = (bars.column("x")[:, 0] > 20).float()
    torch.testing.assert_close(found, above.unfold(0, 4, 1).mean(-1))


def test_ema_over_all_history_by_hand():
    """EMA(x, 0): row L weighs lag k with (1 - 2/(1 + L)) ** k, counted from the first row."""
    values = torch.tensor([[float("nan")], [2.0], [4.0], [float("nan")], [1.0]])[:, :, None]
    bars = Panel(
        values, pd.bdate_range("2020-01-01", periods=5), ["a"], ["x"], spans=torch.tensor([[1, 4]])
    )
    expected = [float("nan"), 2.0]
    for length, rows in ((2, [2, 4]), (3, [2, 4, 0]), (4, [2, 4, 0, 1])):
        weights = (1 - 2 / (1 + length)) ** np.arange(length)[::-1]
        expected.append(float((weights / weights.sum() * rows).sum()))
    np.testing.assert_allclose(column("EMA($x, 0)", bars)[:, 0], expected, rtol=1e-6)


def test_mask_reads_another_instrument(random_bars):
    bars = random_bars(6)
    for text in ("Mask($x, 'I0')", "ChangeInstrument('i0', $x)"):
        found = column(text, bars)
        expected = bars.column("x")[:, :1].expand_as(found)
        torch.testing.assert_close(
            found[bars.mask], expected[bars.mask], equal_nan=True, rtol=0, atol=0
        )
    beta = column("Mean(Mask($x, 'I0'), 3)", bars)
    own = column("Mean($x, 3)", bars)[:, :1].expand_as(beta)
    torch.testing.assert_close(beta[bars.mask], own[bars.mask], equal_nan=True)
    with pytest.raises(ExpressionError, match="unknown instrument 'J0'"):
        column("Mask($x, 'J0')", bars)


def test_unknown_field_names_the_nearest(random_bars):
    bars = random_bars(7)
    named = Panel(bars.values, bars.calendar, bars.instruments, ["close", "open"])
    with pytest.raises(ExpressionError) as caught:
        evaluate(["Mean($clsoe, 5)"], named)
    assert "Did you mean 'close'" in str(caught.value)
    assert str(caught.value).splitlines()[2].strip() == "^" * len("$clsoe")
    assert evaluate(["$CLOSE"], named).values.shape[2] == 1


def test_a_users_own_operator(random_bars):
    bars = random_bars(8, instruments=70)

    @register_operator("Spread", arguments=("series", "series", "window"))
    def spread(left, right, window):
        assert left.shape == right.shape
        return left - right / window

    try:
        found = column("Spread($x, Mean($y, 3), 4)*2", bars)
        expected = (column("$x", bars) - column("Mean($y, 3)", bars) / 4) * 2
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert reach("Spread($x, $y, 4)") == (3, 0)
        register_operator(
            "Spread",
            lambda left, right, window: left.sum(),
            replace=True,
            arguments=("series", "series", "window"),
        )
        with pytest.raises(ExpressionError, match="'Spread' returned"):
            column("Spread($x, $y, 4)", bars)
    finally:
        unregister_operator("Spread")


def test_an_error_in_a_thread_reaches_the_caller(random_bars):
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
def test_nothing_but_the_reach_is_read(random_bars, text):
    """Rows outside the reach may change without a change of the value; the last one inside not."""
    bars = random_bars(9, missing=0.0)
    values = torch.rand(bars.shape, generator=torch.Generator().manual_seed(0)) + 1
    bars = Panel(values, bars.calendar, bars.instruments, bars.fields)
    before, after = reach(text)
    row = 40
    changed = bars.values.clone()
    changed[: row - before] *= 3
    changed[row + after + 1 :] *= 3
    other = Panel(changed, bars.calendar, bars.instruments, bars.fields)
    torch.testing.assert_close(column(text, bars)[row], column(text, other)[row])
    for edge in (row - before, row + after):
        if edge != row or before == after == 0:
            touched = bars.values.clone()
            touched[edge] *= 3
            other = Panel(touched, bars.calendar, bars.instruments, bars.fields)
            assert not torch.allclose(column(text, bars)[row], column(text, other)[row])


def test_empty_and_tiny_panels(random_bars):
    bars = random_bars(0)
    assert evaluate(TEXTS, bars.select(instruments=[])).shape == (70, 0, 6)
    one = bars.select(start=bars.calendar[0], end=bars.calendar[0])
    assert evaluate(TEXTS, one).shape == (1, 5, 6)
    named = Panel(
        torch.full((3, 1, 6), float("nan")),
        bars.calendar[:3],
        ["a"],
        ["open", "high", "low", "close", "vwap", "volume"],
    )
    expressions, names = alpha158()
    assert evaluate(dict(zip(names, expressions, strict=True)), named).values.isnan().all()


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu():
    from scripts.parity.expressions import operator_expressions
    from scripts.parity.stress import stress_market

    bars = stress_market(16, 150)
    texts = operator_expressions() + alpha158()[0] + alpha360()[0][:30]
    texts = list(dict.fromkeys(texts))
    cpu, gpu = evaluate(texts, bars), evaluate(texts, bars.to("cuda"))
    assert gpu.device.type == "cuda"
    for k, text in enumerate(texts):
        ours, theirs = cpu.values[:, :, k], gpu.values[:, :, k].cpu()
        scale = ours[ours.isfinite()].std() if ours.isfinite().any() else torch.tensor(0.0)
        close = (ours - theirs).abs() <= 1e-4 * ours.abs() + 1e-6 * scale
        same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | close
        assert same.float().mean() >= 0.999, text
