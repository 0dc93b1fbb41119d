"""Operators that compare the instruments of a day, beside pandas, and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ExpressionError
from qtorch.data import FrameSource, QlibDataLoader
from qtorch.data.expression import evaluate, reach, register_operator, unregister_operator
from qtorch.data.handler.filter import ExpressionDFilter
from qtorch.data.panel.panel import Panel

NAN = float("nan")


def members_panel(num_dates: int = 24, num_instruments: int = 120, seed: int = 0) -> Panel:
    """Create three blocks of instruments with missing values, ties, groups and a changing mask."""
    rng = np.random.default_rng(seed)
    shape = (num_dates, num_instruments)
    x = np.round(rng.normal(size=shape), 1)
    x[rng.random(shape) < 0.1] = np.nan
    group = rng.integers(0, 4, shape).astype(float)
    group[rng.random(shape) < 0.05] = np.nan
    values = torch.from_numpy(np.stack([x, rng.random(shape) + 1, group], 2).astype(np.float32))
    mask = torch.from_numpy(rng.random(shape) < 0.8)
    names = [f"I{k:03d}" for k in range(num_instruments)]
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    return Panel(values, dates, names, ["x", "y", "g"], mask=mask)


def column(expression: str, bars: Panel) -> np.ndarray:
    return evaluate([expression], bars).values[:, :, 0].double().numpy()


PANDAS = {
    "CSRank": lambda x: x.rank(pct=True),
    "CSZScore": lambda x: (x - x.mean()) / x.std(),
    "CSScale": lambda x: x / x.abs().sum(),
    "CSDemean": lambda x: x - x.mean(),
}


@pytest.mark.parametrize("name", sorted(PANDAS))
@pytest.mark.parametrize("by_group", [False, True])
def test_values_equal_those_of_pandas_over_the_days_members(name, by_group):
    bars = members_panel()
    x = pd.DataFrame(bars.column("x").double().numpy()).where(bars.mask.numpy())
    long = pd.DataFrame({"x": x.stack(), "g": pd.DataFrame(bars.column("g").numpy()).stack()})
    long = long.dropna().rename_axis(["day", "instrument"]).reset_index()
    if by_group:
        values = long.groupby(["day", "g"])["x"].transform(PANDAS[name])
        expected = long.assign(v=values).pivot(index="day", columns="instrument", values="v")
        expected = expected.reindex(index=x.index, columns=x.columns)
    else:
        expected = x.apply(PANDAS[name], axis=1)
    text = f"{name}($x, $g)" if by_group else f"{name}($x)"
    np.testing.assert_allclose(column(text, bars), expected, rtol=1e-6, atol=1e-7)


def test_worked_by_hand():
    values = torch.tensor([[1.0, 3.0, 3.0, NAN, 8.0]])[:, :, None]
    mask = torch.tensor([[True, True, True, True, False]])
    bars = Panel(values, ["2020-01-01"], list("abcde"), ["x"], mask=mask)
    third = 1 / 3
    for text, expected in {
        "CSRank($x)": [third, 2.5 / 3, 2.5 / 3, NAN, NAN],
        "CSDemean($x)": [-4 / 3, 2 / 3, 2 / 3, NAN, NAN],
        "CSScale($x)": [1 / 7, 3 / 7, 3 / 7, NAN, NAN],
        "CSScale(CSRank($x))*2": [third, 2.5 / 3, 2.5 / 3, NAN, NAN],
        "CSZScore($x*0+0.1)": [NAN] * 5,
        "CSRank(1/($x-3))": [third, 2.5 / 3, 2.5 / 3, NAN, NAN],  # infinity ranks last
        "CSDemean(1/($x-1))": [NAN, 0, 0, NAN, NAN],  # infinity is missing
        "CSRank($x > 2)": [third, 2.5 / 3, 2.5 / 3, NAN, NAN],
    }.items():
        np.testing.assert_allclose(column(text, bars)[0], expected, rtol=1e-6, err_msg=text)


TEXTS = [
    "CSRank(Mean($x, 3))",
    "Mean(CSRank($x), 4)-CSRank($y)",
    "CSRank(CSDemean(Delta(CSRank($x), 2), $g))",
    "CSRank($y)*$y",
    "$x",
    "Corr(CSRank($x), CSRank($y), 5)",
    "If(CSRank($y) > 0.5, CSRank($y < 1.5), Ref($y, 1))",
]


def test_blocks_of_columns_threads_and_neighbours_do_not_matter(monkeypatch):
    bars = members_panel()
    expected = evaluate(TEXTS, bars).values.clone()
    for width, threads in ((17, 2), (1000, 1)):
        monkeypatch.setattr("qtorch.data.expression.evaluation._COLUMNS", width)
        monkeypatch.setattr("qtorch.data.expression.cross_section._CELLS", width * 10)
        values = evaluate(TEXTS, bars, num_threads=threads).values
        torch.testing.assert_close(values, expected, equal_nan=True, rtol=0, atol=0)
    for k in (0, 3, 6):
        text = TEXTS[k]
        single = evaluate([text], bars).values[:, :, 0]
        torch.testing.assert_close(single, expected[:, :, k], equal_nan=True, msg=text)
    monkeypatch.setattr("qtorch.data.expression.evaluation.MAX_STORED_BYTES", 60_000)
    in_parts = evaluate(TEXTS, bars).values
    torch.testing.assert_close(in_parts, expected, equal_nan=True, rtol=1e-6, atol=1e-7)
    order = list(reversed(bars.instruments))
    reversed_values = evaluate(TEXTS, bars.select(instruments=order)).values.flip(1)
    torch.testing.assert_close(reversed_values, expected, equal_nan=True)
    part = evaluate(TEXTS, bars, rows=slice(10, 20))
    torch.testing.assert_close(part.values, expected[10:20], equal_nan=True)
    assert list(part.calendar) == list(bars.calendar[10:20])


def test_future_values_and_members_do_not_matter():
    bars = members_panel()
    values, mask = bars.values.clone(), bars.mask.clone()
    values[20:] *= -3
    mask[20:] = ~mask[20:]
    changed = Panel(values, bars.calendar, bars.instruments, bars.fields, mask=mask)
    before, after = (evaluate(TEXTS, b).values for b in (bars, changed))
    torch.testing.assert_close(after[:20], before[:20], equal_nan=True, rtol=0, atol=0)
    assert not torch.allclose(after[20:], before[20:], equal_nan=True)


def leaving_member_source() -> FrameSource:
    """Create a universe of three: c leaves after day 5, d joins on day 8; z is no member."""
    dates = pd.bdate_range("2020-01-01", periods=12)
    levels = dict(zip("abcdz", (1.0, 2.0, 3.0, 4.0, 0.5), strict=True))
    frame = pd.concat(
        {
            n: pd.DataFrame({"close": v + np.arange(12) * 0.01}, index=dates)
            for n, v in levels.items()
        },
        names=["instrument", "datetime"],
    ).swaplevel()
    spans = {
        "a": [(dates[0], dates[-1])],
        "b": [(dates[0], dates[-1])],
        "c": [(dates[0], dates[4])],
        "d": [(dates[7], dates[-1])],
    }
    return FrameSource(frame.sort_index(), universes={"u": spans})


def test_history_before_the_dates_has_the_members_of_its_day():
    """A member that has left before the first date still counts on its days."""
    source = leaving_member_source()
    dates = source.calendar()
    text = "Mean(CSRank($close), 4)"
    whole = source.features("u", [text])
    late = source.features("u", [text], start_time=dates[6])
    pd.testing.assert_frame_equal(late, whole.loc[late.index])
    assert float(late.loc[("a", dates[6])].iloc[0]) == pytest.approx((1 / 3 * 2 + 1 / 2 * 2) / 4)
    assert "c" not in late.index.get_level_values(0)
    assert "c" in whole.index.get_level_values(0)
    loader = QlibDataLoader([text], source=source)
    view = loader.view("u", dates[6], None)
    assert list(view.instruments) == ["a", "b", "d"]
    loaded = loader.load("u", dates[6], None).swaplevel().sort_index()
    pd.testing.assert_frame_equal(loaded, late, check_names=False)


def test_a_day_compares_what_the_filters_have_left():
    source = leaving_member_source()
    rule = ExpressionDFilter("$close > 2")
    dates = source.calendar()
    frame = QlibDataLoader(["CSRank($close)"], filter_pipe=[rule], source=source).load("u")
    assert frame.loc[(dates[1], "b")].iloc[0] == 0.5
    assert (dates[1], "a") not in frame.index
    top = ExpressionDFilter("CSRank($close) > 0.7")
    frame = QlibDataLoader(["$close"], filter_pipe=[top], source=source).load("u")
    assert list(frame.loc[dates[1]].index) == ["c"]


def test_cross_section_and_another_instrument():
    bars = members_panel()
    index = column("CSDemean(Mask($x, 'I003'))", bars)
    assert np.nanmax(np.abs(index)) < 1e-6  # the same value for all members
    with pytest.raises(ExpressionError, match=r"CSRank\(Mask"):
        evaluate(["Mask(1+CSRank($x), 'I003')"], bars)
    assert reach("Mean(CSRank(Ref($x, 2)), 5)") == (6, 0)
    with pytest.raises(ExpressionError, match="1 or 2 arguments"):
        evaluate(["CSRank($x, $g, $y)"], bars)


@pytest.fixture
def operator_name():
    yield "OwnRank"
    unregister_operator("OwnRank")


def test_a_users_operator_over_the_day(operator_name):
    bars = members_panel()

    @register_operator(operator_name, arguments=("series", "window"), cross_section=True)
    def own_rank(x, window):
        assert x.shape == bars.shape[:2]
        assert bool(x[~bars.mask].isnan().all())
        valid = ~x.isnan()
        return x.nan_to_num(nan=1e9).argsort(1).argsort(1).double().add(1) / valid.sum(1)[:, None]

    values = column("OwnRank($y, 3)*2", bars)
    np.testing.assert_allclose(values, column("CSRank($y)*2", bars), rtol=1e-6)
    assert reach("OwnRank($y, 3)") == (2, 0)


@pytest.mark.parametrize("num_instruments", [2, 5, 120])
def test_an_undeclared_operator_over_the_day_is_refused(operator_name, num_instruments):
    bars = members_panel(num_instruments=num_instruments)
    for function in (
        lambda x: x.argsort(1).argsort(1).to(x.dtype) + 1,
        lambda x: x - x.nanmean(1, keepdim=True),
        lambda x: x / x.max(),
        lambda x: x.flip(1),
    ):
        register_operator(operator_name, function, arguments=("series",), replace=True)
        with pytest.raises(ExpressionError, match="cross_section=True"):
            evaluate(["OwnRank($y)"], bars)
    register_operator(operator_name, lambda x: x.cumsum(0), arguments=("series",), replace=True)
    assert evaluate(["OwnRank($y)"], bars).shape[1] == num_instruments


def test_rolling_operators_beyond_qlibs(random_bars):
    bars = random_bars(3)
    x = pd.DataFrame(bars.column("x").double().numpy())
    rows = pd.DataFrame({"first": bars.spans[:, 0], "last": bars.spans[:, 1]})

    def decay(values):
        weights = np.arange(1.0, len(values) + 1)[~np.isnan(values)]
        values = values[~np.isnan(values)]
        return (weights * values).sum() / weights.sum() if len(values) else NAN

    def position(extreme):
        return lambda v: NAN if np.isnan(v).all() else extreme(v) + 1.0

    functions = {
        "DecayLinear": decay,
        "Product": lambda v: NAN if np.isnan(v).all() else np.nanprod(v),
        "ArgMax": position(np.nanargmax),
        "ArgMin": position(np.nanargmin),
    }
    for text, function in functions.items():
        for window in (1, 3, 20):
            result = column(f"{text}($x/20, {window})", bars)
            for k, (first, last) in enumerate(rows.to_numpy()):
                part = x[k].loc[first:last] / 20
                expected = part.rolling(window, min_periods=1).apply(function, raw=True)
                np.testing.assert_allclose(result[first : last + 1, k], expected, rtol=2e-5)


def test_hundreds_of_terms_and_deep_nests(random_bars):
    """Generated expressions, such as a sum of 199 lags, which Qlib computes."""
    bars = random_bars(1, dates=260, missing=0.0, instruments=2)
    x = bars.column("x")[:, 0].double()
    lags = "+".join(["$x"] + [f"Ref($x, {k})" for k in range(1, 200)])
    result = column(lags, bars)[:, 0]
    expected = x.unfold(0, 200, 1).sum(1)
    np.testing.assert_allclose(result[199:], expected, rtol=1e-5)
    assert np.isnan(result[:199]).all()
    assert reach(lags) == (199, 0)
    nested = "(" * 199 + "$x" + "".join(f"+Ref($x, {k}))" for k in range(1, 200))
    np.testing.assert_array_equal(column(nested, bars)[:, 0], result)
    right = "$x+" + "".join(f"(Ref($x, {k})+" for k in range(1, 199)) + "Ref($x, 199)" + ")" * 198
    np.testing.assert_allclose(column(right, bars)[199:, 0], expected, rtol=1e-5)
    chain = "Abs(" * 700 + "$x" + ")" * 700
    np.testing.assert_array_equal(column(chain, bars), bars.column("x").double())
    assert column("+".join(["$x"] * 3_000), bars)[0, 0] == pytest.approx(
        3_000 * float(x[0]), rel=1e-4
    )
    masked = "Mask(" + "+".join(["$x"] * 800) + ", 'I0')"
    assert column(masked, bars)[0, 0] == pytest.approx(800 * float(x[0]), rel=1e-4)
