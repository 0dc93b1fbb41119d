from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, DataError
from qtorch.data.columns import PanelColumns, instrument_major
from qtorch.data.elementwise import Affine, Clip, FillNaN, ReplaceInf, Tanh
from qtorch.data.panel import Panel
from qtorch.data.window_columns import FIELDS, WindowColumns

D, N, F = 30, 5, 7
NAMES = [f"F{k}" for k in range(F)]
INF, NAN = float("inf"), float("nan")


def panel(layout: str = "instrument", seed: int = 0, num_dates: int = D) -> Panel:
    torch.manual_seed(seed)
    values = torch.randn(num_dates, N, F) * 3
    values[torch.rand(values.shape) < 0.1] = NAN
    if layout == "instrument":
        stored = instrument_major(num_dates, N, F)
    else:
        stored = torch.empty(F, num_dates, N).permute(1, 2, 0)
    stored.copy_(values)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    return Panel(stored, dates, [f"I{k}" for k in range(N)], NAMES)


def same(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> bool:
    b = torch.tensor(b) if isinstance(b, np.ndarray) else b
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# -- element-wise operations -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Affine(2.0, 4.0), [-0.5, 0.0, NAN, INF, -INF]),
        (Clip(-1.0, 3.0), [0.0, 2.0, NAN, 3.0, -1.0]),
        (FillNaN(7.0), [0.0, 2.0, 7.0, INF, -INF]),
        (ReplaceInf(), [0.0, 2.0, NAN, NAN, NAN]),
        (ReplaceInf(5.0, -5.0), [0.0, 2.0, NAN, 5.0, -5.0]),
        (Tanh(), [0.0, float(np.tanh(2.0)), NAN, 1.0, -1.0]),
    ],
)
def test_an_operation_on_all_columns_and_on_one_of_two(operation, expected):
    x = torch.tensor([0.0, 2.0, NAN, INF, -INF])
    one = operation.apply_(x.clone()[:, None])[:, 0]
    torch.testing.assert_close(one, torch.tensor(expected), equal_nan=True)
    # Widened to two columns of which it may touch only the second.
    both = operation.spread([None, 0]).apply_(torch.stack([x, x], 1))
    assert same(both[:, 0], x)
    torch.testing.assert_close(both[:, 1], torch.tensor(expected), equal_nan=True)


def test_operations_follow_each_other_by_column():
    data = panel()
    columns = (
        PanelColumns(data)
        .with_elementwise(["F3", "F1"], Affine(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0])))
        .with_elementwise(["F1"], Clip(-0.5, 0.5))
        .with_elementwise(NAMES, FillNaN(torch.arange(float(F))))
    )
    raw = {name: data.column(name).numpy() for name in NAMES}
    f1 = np.clip((raw["F1"] - np.float32(1)) / np.float32(5), -0.5, 0.5)
    f3 = (raw["F3"] - np.float32(3)) / np.float32(2)
    expected = {**raw, "F1": f1, "F3": f3}
    for k, name in enumerate(NAMES):
        filled = np.where(np.isnan(expected[name]), np.float32(k), expected[name])
        assert same(columns.column(name), filled), name
    # In any selection and order, and through a pack, the parameters stay with their columns.
    some = columns.keep(["F6", "F1", "F3"])
    packed = some.pack().values
    for k, name in enumerate(some.names):
        assert same(some.column(name), columns.column(name))
        assert same(packed[:, :, k].t(), columns.column(name))
    assert same(torch.stack([columns.column(n) for n in NAMES]), columns.block(NAMES))


def test_reading_never_changes_the_storage():
    data = panel()
    before = data.values.clone()
    columns = PanelColumns(data).with_elementwise(NAMES, FillNaN(0.0))
    columns.column("F2")
    columns.block(NAMES)
    packed = columns.pack()
    packed.gather(torch.tensor([9]), torch.tensor([1]), 4, "none")
    packed.infinite()
    columns.keep(["F1", "F2"]).pack()
    assert same(data.values, before)


def test_written_columns_replace_and_forget_earlier_operations():
    data = panel()
    ones = torch.ones(D, N)
    columns = (
        PanelColumns(data)
        .with_elementwise(["F1", "F2"], Affine(torch.tensor([10.0, 20.0])))
        .with_columns({"F1": ones, "NEW": 2 * ones})
        .with_elementwise(["F1"], Affine(0.0, 4.0))
    )
    assert columns.names == (*NAMES, "NEW")
    assert same(columns.column("F1"), ones / 4)
    assert same(columns.column("NEW"), 2 * ones)
    assert same(columns.column("F2"), data.column("F2") - 20)
    packed = columns.pack().values
    for k, name in enumerate(columns.names):
        assert same(packed[:, :, k].t(), columns.column(name)), name


def test_derived_columns_share_storage():
    data = panel("field")
    columns = PanelColumns(data)
    assert columns.column("F4").data_ptr() == data.column("F4").data_ptr()
    derived = columns.keep(["F4"]).with_elementwise(["F4"], Affine(1.0))
    assert same(columns.column("F4"), data.column("F4"))
    assert same(derived.column("F4"), data.column("F4") - 1)


def test_errors_name_the_nearest_column():
    columns = PanelColumns(panel())
    with pytest.raises(DataError, match=r"unknown column 'f3'.*'F3'"):
        columns.column("f3")
    with pytest.raises(DataError, match="unknown column"):
        columns.with_elementwise(["G"], FillNaN())
    with pytest.raises(DataError, match=r"shape \(3, 5\), expected \(30, 5\)"):
        columns.with_columns({"X": torch.zeros(3, N)})
    with pytest.raises(DataError, match="given twice"):
        PanelColumns(panel(), ["F1", "F1"])
    with pytest.raises(ArgumentError, match="parameters for 2 columns, but 3"):
        columns.with_elementwise(["F1", "F2", "F3"], Affine(torch.zeros(2)))


# -- packing -----------------------------------------------------------------------------------


def test_whole_instrument_major_storage_is_packed_without_a_copy(monkeypatch):
    data = panel()
    assert PanelColumns(data).pack().values.data_ptr() == data.values.data_ptr()
    chained = PanelColumns(data).with_elementwise(NAMES, FillNaN(0.0))
    few = chained.pack()  # few bytes: the chain is applied once, to a copy
    assert few.values.data_ptr() != data.values.data_ptr()
    assert not len(few.fused)
    del few
    monkeypatch.setattr("qtorch.data.columns.COPIED_BYTES", 0)
    assert chained.pack().values.data_ptr() == data.values.data_ptr()


@pytest.mark.parametrize("copied", [0, 256 << 20])
@pytest.mark.parametrize("layout", ["instrument", "field"])
@pytest.mark.parametrize("names", [NAMES, NAMES[2:5], ["F6", "F0", "F3"]])
def test_every_layout_packs_the_same(layout, names, copied, monkeypatch):
    monkeypatch.setattr("qtorch.data.columns.COPIED_BYTES", copied)
    data = panel(layout, num_dates=70)  # more than one block of dates
    columns = PanelColumns(data).keep(names).with_elementwise(names[:1], Clip(-1.0, 1.0))
    x = columns.pack().gather(torch.tensor([69, 5]), torch.tensor([4, 0]), 1, "none")[:, 0]
    for k, name in enumerate(names):
        assert same(x[:, k], columns.column(name)[[69, 5], [4, 0]])


def test_one_pack_is_shared_while_it_is_held():
    columns = PanelColumns(panel()).keep(["F1", "F2"])
    history = torch.ones(D, N, dtype=torch.bool)
    held = columns.pack("cpu", history=history)
    assert columns.pack("cpu", history=history) is held
    assert columns.pack("cpu", history=history.clone()) is not held
    again = pickle.loads(pickle.dumps(columns))
    assert same(again.column("F1"), columns.column("F1"))


def test_infinite_columns_are_found_after_the_operations_and_where_rows_exist():
    data = panel()
    data.values[3, 1, 2] = INF
    data.values[4, 1, 4] = -INF
    data.values[9, 2, 5] = INF
    history = torch.ones(D, N, dtype=torch.bool)
    history[9, 2] = False
    columns = PanelColumns(data).with_elementwise(["F4"], Clip(-3.0, 3.0))
    for view in (columns, columns.keep(NAMES[1:])):
        found = view.pack("cpu", history=history).infinite().tolist()
        assert [n for n, bad in zip(view.names, found, strict=True) if bad] == ["F2"]


# -- windows of raw fields ---------------------------------------------------------------------

STEPS, LEAD = 6, 4


def bars() -> Panel:
    torch.manual_seed(1)
    values = torch.rand(D + LEAD, N, len(FIELDS)) + 1
    values[torch.rand(values.shape) < 0.05] = NAN
    values[8, 2, FIELDS.index("volume")] = 0.0
    dates = pd.bdate_range("2020-01-01", periods=D + LEAD)
    return Panel(values, dates, [f"I{k}" for k in range(N)], FIELDS)


def alpha(data: Panel) -> dict[str, np.ndarray]:
    """The columns by pandas, as Qlib's expressions say them."""
    frames = {f: pd.DataFrame(data.column(f).numpy()) for f in FIELDS}
    out = {}
    for field in FIELDS:
        today = frames["volume"] + 1e-12 if field == "volume" else frames["close"]
        for step in range(STEPS - 1, -1, -1):
            shifted = frames[field].shift(step)
            out[f"{field.upper()}{step}"] = (shifted / today).to_numpy()[LEAD:]
    return out


def test_window_columns_are_qlibs_expressions():
    data = bars()
    columns = WindowColumns(data, num_steps=STEPS, lead=LEAD)
    expected = alpha(data)
    assert columns.names == tuple(expected)
    assert columns.shape == (D, N, 6 * STEPS)
    for name, values in expected.items():
        assert values.dtype == np.float32
        assert same(columns.column(name), values), name


def test_windows_hold_the_columns_in_feature_major_order():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    date, who = torch.tensor([0, 3, D - 1]), torch.tensor([4, 2, 0])
    packed = columns.pack()
    x = packed.gather(date, who)
    assert x.shape == (3, STEPS, 6)
    assert packed.window_shape(1) == columns.window_shape(1) == (STEPS, 6)
    assert packed.window_shape(2) == columns.window_shape(2) == (2, 6 * STEPS)
    flat = x.permute(0, 2, 1).flatten(1)
    for k, name in enumerate(columns.names):
        assert same(flat[:, k], columns.column(name)[date, who]), name


def test_rows_before_the_stored_ones_are_nan():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=0)
    assert columns.column("CLOSE5")[:5].isnan().all()
    x = columns.pack().gather(torch.tensor([0, 2]), torch.tensor([0, 3]))
    assert x[0, :-1].isnan().all()
    assert x[1, :3].isnan().all()
    assert not x[1, 3:].isnan().all()


def test_window_operations_have_a_parameter_a_column():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    count = len(columns.names)
    changed = columns.with_elementwise(
        columns.names, Affine(torch.arange(count) / 7.0, torch.arange(count) + 1.0)
    ).with_elementwise(["LOW3"], FillNaN(9.0))
    written = torch.randn(D, N)
    changed = changed.with_columns({"VWAP2": written})
    date, who = torch.arange(D), torch.arange(D) % N
    flat = changed.pack().gather(date, who).permute(0, 2, 1).flatten(1)
    for k, name in enumerate(columns.names):
        assert same(flat[:, k], changed.column(name)[date, who]), name
    assert same(changed.column("VWAP2"), written)
    assert same(changed.column("OPEN1"), (columns.column("OPEN1") - 10 / 7.0) / 11.0)


def test_chosen_fields_stay_windows_and_chosen_columns_become_flat():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    date, who = torch.arange(D), torch.arange(D) % N
    opens = columns.keep([n for n in columns.names if n.startswith(("OPEN", "VOLUME"))])
    assert opens.window_fields == ("open", "volume")
    x = opens.pack().gather(date, who)
    assert same(x[:, 1, 0], columns.column("OPEN4")[date, who])
    assert x.shape == (D, STEPS, 2)
    some = columns.keep(["HIGH2", "CLOSE5"]).with_columns({"MINE": torch.ones(D, N)})
    packed = some.pack()
    assert packed.window_shape(1) == some.window_shape(1) == (1, 3)
    x = packed.gather(date, who)[:, 0]
    for k, name in enumerate(some.names):
        assert same(x[:, k], some.column(name)[date, who])


def test_longer_windows_of_window_columns_are_steps_of_flat_columns():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    history = torch.ones(D, N, dtype=torch.bool)
    history[10, 1] = False
    packed = columns.pack("cpu", history=history)
    x = packed.gather(torch.tensor([11, 1]), torch.tensor([1, 0]), 3, "none")
    assert x.shape == (2, 3, len(columns.names))
    assert x[0, 1].isnan().all()
    assert x[1, 0].isnan().all()
    for k, name in enumerate(columns.names):
        column = columns.column(name)
        assert same(x[0, [0, 2], k], column[[9, 11], [1, 1]])


def test_infinite_windows_are_found():
    data = bars()
    data.values[10, 1, FIELDS.index("close")] = 0.0
    columns = WindowColumns(data, num_steps=STEPS, lead=LEAD)
    found = columns.pack().infinite().tolist()
    bad = {n for n, wrong in zip(columns.names, found, strict=True) if wrong}
    by_column = {n for n in columns.names if bool(columns.column(n).isinf().any())}
    assert bad == by_column != set()
    fixed = columns.with_elementwise(columns.names, ReplaceInf())
    assert not fixed.pack().infinite().any()


def test_a_missing_field_is_named():
    data = bars().select(fields=["close", "open", "high", "low", "volume"])
    with pytest.raises(DataError, match="unknown field 'vwap'"):
        WindowColumns(data)
