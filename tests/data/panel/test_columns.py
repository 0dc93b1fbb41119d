from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, DataError
from qtorch.data.panel.columns import PanelColumns, instrument_major
from qtorch.data.panel.elementwise import Affine, Clip, FillNaN, Tanh
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.window_columns import FIELDS, WindowColumns

D, N, F = 30, 5, 7
NAMES = [f"F{k}" for k in range(F)]
INF, NAN = float("inf"), float("nan")


def panel(layout: str = "instrument", seed: int = 0, num_dates: int = D) -> Panel:
    torch.manual_seed(seed)
    values = torch.randn(num_dates, N, F) * 3
    values[torch.rand(values.shape) < 0.1] = NAN
    if layout == "instrument":
        storage = instrument_major(num_dates, N, F)
    else:
        storage = torch.empty(F, num_dates, N).permute(1, 2, 0)
    storage.copy_(values)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    return Panel(storage, dates, [f"I{k}" for k in range(N)], NAMES)


def same(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> bool:
    b = torch.tensor(b) if isinstance(b, np.ndarray) else b
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# -- element-wise operations -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected_values"),
    [
        (Affine(2.0, 4.0), [-0.5, 0.0, NAN, INF, -INF]),
        (Clip(-1.0, 3.0), [0.0, 2.0, NAN, 3.0, -1.0]),
        (FillNaN(7.0), [0.0, 2.0, 7.0, INF, -INF]),
        (Tanh(), [0.0, float(np.tanh(2.0)), NAN, 1.0, -1.0]),
    ],
)
def test_operations_on_all_columns_and_on_one_of_two(operation, expected_values):
    x = torch.tensor([0.0, 2.0, NAN, INF, -INF])
    single_column = operation.apply_(x.clone()[:, None])[:, 0]
    torch.testing.assert_close(single_column, torch.tensor(expected_values), equal_nan=True)
    # Widened to two columns, it must only change the second.
    two_columns = operation.reindex([None, 0]).apply_(torch.stack([x, x], 1))
    assert same(two_columns[:, 0], x)
    torch.testing.assert_close(two_columns[:, 1], torch.tensor(expected_values), equal_nan=True)


def test_operations_are_applied_in_order_by_column():
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
    expected_columns = {**raw, "F1": f1, "F3": f3}
    for k, name in enumerate(NAMES):
        filled_values = np.where(
            np.isnan(expected_columns[name]), np.float32(k), expected_columns[name]
        )
        assert same(columns.column(name), filled_values), name
    # The parameters stay with their columns in any selection and order, and in a pack.
    some = columns.keep(["F6", "F1", "F3"])
    packed_values = some.pack().values
    for k, name in enumerate(some.names):
        assert same(some.column(name), columns.column(name))
        assert same(packed_values[:, :, k].t(), columns.column(name))
    assert same(torch.stack([columns.column(n) for n in NAMES]), columns.block(NAMES))


def test_reading_never_changes_the_storage():
    data = panel()
    before = data.values.clone()
    columns = PanelColumns(data).with_elementwise(NAMES, FillNaN(0.0))
    columns.column("F2")
    columns.block(NAMES)
    pack = columns.pack()
    pack.gather(torch.tensor([9]), torch.tensor([1]), 4, "none")
    pack.infinite_columns()
    columns.keep(["F1", "F2"]).pack()
    assert same(data.values, before)


def test_replaced_columns_drop_earlier_operations():
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
    packed_values = columns.pack().values
    for k, name in enumerate(columns.names):
        assert same(packed_values[:, :, k].t(), columns.column(name)), name


def test_derived_columns_share_storage():
    data = panel("field")
    columns = PanelColumns(data)
    assert columns.column("F4").data_ptr() == data.column("F4").data_ptr()
    child = columns.keep(["F4"]).with_elementwise(["F4"], Affine(1.0))
    assert same(columns.column("F4"), data.column("F4"))
    assert same(child.column("F4"), data.column("F4") - 1)


def test_errors_name_the_nearest_column():
    columns = PanelColumns(panel())
    with pytest.raises(DataError, match=r"unknown column 'f3'.*'F3'"):
        columns.column("f3")
    with pytest.raises(DataError, match="unknown column"):
        columns.with_elementwise(["G"], FillNaN())
    with pytest.raises(DataError, match=r"shape \(3, 5\), expected \(30, 5\)"):
        columns.with_columns({"X": torch.zeros(3, N)})
    with pytest.raises(DataError, match="duplicates"):
        PanelColumns(panel(), ["F1", "F1"])
    with pytest.raises(ArgumentError, match="parameters for 2 columns, but got 3"):
        columns.with_elementwise(["F1", "F2", "F3"], Affine(torch.zeros(2)))


# -- packing -----------------------------------------------------------------------------------


def test_whole_instrument_major_storage_is_packed_without_a_copy(monkeypatch):
    data = panel()
    assert PanelColumns(data).pack().values.data_ptr() == data.values.data_ptr()
    columns = PanelColumns(data).with_elementwise(NAMES, FillNaN(0.0))
    small_pack = columns.pack()  # small: the chain is applied once, to a copy
    assert small_pack.values.data_ptr() != data.values.data_ptr()
    assert not len(small_pack.fused_chain)
    del small_pack
    monkeypatch.setattr("qtorch.data.panel.columns.MAX_COPY_BYTES", 0)
    assert columns.pack().values.data_ptr() == data.values.data_ptr()


@pytest.mark.parametrize("max_copy_bytes", [0, 256 << 20])
@pytest.mark.parametrize("layout", ["instrument", "field"])
@pytest.mark.parametrize("names", [NAMES, NAMES[2:5], ["F6", "F0", "F3"]])
def test_every_layout_packs_the_same(layout, names, max_copy_bytes, monkeypatch):
    monkeypatch.setattr("qtorch.data.panel.columns.MAX_COPY_BYTES", max_copy_bytes)
    data = panel(layout, num_dates=70)  # more than one block of dates
    columns = PanelColumns(data).keep(names).with_elementwise(names[:1], Clip(-1.0, 1.0))
    x = columns.pack().gather(torch.tensor([69, 5]), torch.tensor([4, 0]), 1, "none")[:, 0]
    for k, name in enumerate(names):
        assert same(x[:, k], columns.column(name)[[69, 5], [4, 0]])


def test_a_pack_is_shared_while_a_caller_holds_it():
    columns = PanelColumns(panel()).keep(["F1", "F2"])
    history = torch.ones(D, N, dtype=torch.bool)
    first_pack = columns.pack("cpu", history=history)
    assert columns.pack("cpu", history=history) is first_pack
    assert columns.pack("cpu", history=history.clone()) is not first_pack
    restored_columns = pickle.loads(pickle.dumps(columns))
    assert same(restored_columns.column("F1"), columns.column("F1"))


def test_infinities_count_after_operations_and_in_existing_rows():
    data = panel()
    data.values[3, 1, 2] = INF
    data.values[4, 1, 4] = -INF
    data.values[9, 2, 5] = INF
    history = torch.ones(D, N, dtype=torch.bool)
    history[9, 2] = False
    columns = PanelColumns(data).with_elementwise(["F4"], Clip(-3.0, 3.0))
    for view in (columns, columns.keep(NAMES[1:])):
        is_infinite = view.pack("cpu", history=history).infinite_columns().tolist()
        assert [
            n for n, has_infinity in zip(view.names, is_infinite, strict=True) if has_infinity
        ] == ["F2"]


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
    """Compute the columns of Qlib's expressions with pandas."""
    frames = {f: pd.DataFrame(data.column(f).numpy()) for f in FIELDS}
    out = {}
    for field in FIELDS:
        today = frames["volume"] + 1e-12 if field == "volume" else frames["close"]
        for step in range(STEPS - 1, -1, -1):
            past = frames[field].shift(step)
            out[f"{field.upper()}{step}"] = (past / today).to_numpy()[LEAD:]
    return out


def test_window_columns_are_qlibs_expressions():
    data = bars()
    columns = WindowColumns(data, num_steps=STEPS, lead=LEAD)
    expected_columns = alpha(data)
    assert columns.names == tuple(expected_columns)
    assert columns.shape == (D, N, 6 * STEPS)
    for name, values in expected_columns.items():
        assert values.dtype == np.float32
        assert same(columns.column(name), values), name


def test_windows_hold_the_columns_in_feature_major_order():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    date, instrument = torch.tensor([0, 3, D - 1]), torch.tensor([4, 2, 0])
    pack = columns.pack()
    x = pack.gather(date, instrument)
    assert x.shape == (3, STEPS, 6)
    assert pack.window_shape(1) == columns.window_shape(1) == (STEPS, 6)
    assert pack.window_shape(2) == columns.window_shape(2) == (2, 6 * STEPS)
    flat = x.permute(0, 2, 1).flatten(1)
    for k, name in enumerate(columns.names):
        assert same(flat[:, k], columns.column(name)[date, instrument]), name


def test_rows_before_the_stored_ones_are_nan():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=0)
    assert columns.column("CLOSE5")[:5].isnan().all()
    x = columns.pack().gather(torch.tensor([0, 2]), torch.tensor([0, 3]))
    assert x[0, :-1].isnan().all()
    assert x[1, :3].isnan().all()
    assert not x[1, 3:].isnan().all()


def test_window_operations_have_one_parameter_per_column():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    count = len(columns.names)
    processed_columns = columns.with_elementwise(
        columns.names, Affine(torch.arange(count) / 7.0, torch.arange(count) + 1.0)
    ).with_elementwise(["LOW3"], FillNaN(9.0))
    new_values = torch.randn(D, N)
    processed_columns = processed_columns.with_columns({"VWAP2": new_values})
    date, instrument = torch.arange(D), torch.arange(D) % N
    flat = processed_columns.pack().gather(date, instrument).permute(0, 2, 1).flatten(1)
    for k, name in enumerate(columns.names):
        assert same(flat[:, k], processed_columns.column(name)[date, instrument]), name
    assert same(processed_columns.column("VWAP2"), new_values)
    assert same(processed_columns.column("OPEN1"), (columns.column("OPEN1") - 10 / 7.0) / 11.0)


def test_selected_fields_stay_windows_and_selected_columns_are_flat():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    date, instrument = torch.arange(D), torch.arange(D) % N
    opens = columns.keep([n for n in columns.names if n.startswith(("OPEN", "VOLUME"))])
    assert opens.window_fields == ("open", "volume")
    x = opens.pack().gather(date, instrument)
    assert same(x[:, 1, 0], columns.column("OPEN4")[date, instrument])
    assert x.shape == (D, STEPS, 2)
    some = columns.keep(["HIGH2", "CLOSE5"]).with_columns({"MINE": torch.ones(D, N)})
    pack = some.pack()
    assert pack.window_shape(1) == some.window_shape(1) == (1, 3)
    x = pack.gather(date, instrument)[:, 0]
    for k, name in enumerate(some.names):
        assert same(x[:, k], some.column(name)[date, instrument])


def test_longer_windows_of_window_columns_are_steps_of_flat_columns():
    columns = WindowColumns(bars(), num_steps=STEPS, lead=LEAD)
    history = torch.ones(D, N, dtype=torch.bool)
    history[10, 1] = False
    pack = columns.pack("cpu", history=history)
    x = pack.gather(torch.tensor([11, 1]), torch.tensor([1, 0]), 3, "none")
    assert x.shape == (2, 3, len(columns.names))
    assert x[0, 1].isnan().all()
    assert x[1, 0].isnan().all()
    for k, name in enumerate(columns.names):
        column = columns.column(name)
        assert same(x[0, [0, 2], k], column[[9, 11], [1, 1]])


def test_infinite_windows_are_detected():
    data = bars()
    data.values[10, 1, FIELDS.index("close")] = 0.0
    columns = WindowColumns(data, num_steps=STEPS, lead=LEAD)
    is_infinite = columns.pack().infinite_columns().tolist()
    infinite_names = {
        n for n, has_infinity in zip(columns.names, is_infinite, strict=True) if has_infinity
    }
    by_column = {n for n in columns.names if bool(columns.column(n).isinf().any())}
    assert infinite_names == by_column != set()
    fixed = columns.with_elementwise(columns.names, Clip(-3.0, 3.0))
    assert not fixed.pack().infinite_columns().any()


def test_a_missing_field_is_named():
    data = bars().select(fields=["close", "open", "high", "low", "volume"])
    with pytest.raises(DataError, match="unknown field 'vwap'"):
        WindowColumns(data)
