from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.samples import build_samples
from qtorch.data.panel import gather
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.elementwise import Affine
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.panel.gather import FILLS, DensePackedColumns
from qtorch.data.panel.panel import Panel

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import windows as parity  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_windows.npz"
NAN = float("nan")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def window_rows(
    exists: np.ndarray, date: int, instrument: int, step_len: int, fill: str
) -> list[int]:
    """Build a window's rows one by one; -1 is missing."""
    days = [d for d in range(len(exists)) if exists[d].any() and d <= date]
    rows = [-1] * max(0, step_len - len(days)) + days[-step_len:]
    rows = [d if d >= 0 and exists[d, instrument] else -1 for d in rows]
    if fill != "none":
        for k in range(1, step_len):
            if rows[k] < 0:
                rows[k] = rows[k - 1]
    if fill == "ffill+bfill":
        for k in range(step_len - 2, -1, -1):
            if rows[k] < 0:
                rows[k] = rows[k + 1]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    num_dates=st.integers(1, 14),
    num_instruments=st.integers(1, 4),
    step_len=st.integers(1, 9),
    fill=st.sampled_from(FILLS),
    missing=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    owns_values=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_windows_equal_those_built_row_by_row(
    num_dates, num_instruments, step_len, fill, missing, owns_values, seed
):
    rng = np.random.default_rng(seed)
    exists = rng.random((num_dates, num_instruments)) >= missing
    values = torch.arange(num_instruments * num_dates * 2.0).view(num_instruments, num_dates, 2)
    values = torch.where(torch.from_numpy(exists.T)[..., None], values, 1e6)  # must not show
    pack = DensePackedColumns(values, history=torch.from_numpy(exists), owns_values=owns_values)
    cells = [(d, n) for d in range(num_dates) for n in range(num_instruments)]
    date, instrument = (torch.tensor(part) for part in zip(*cells, strict=True))
    x = pack.gather(date, instrument, step_len, fill)
    assert x.shape == (len(cells), step_len, 2)
    for k, (d, n) in enumerate(cells):
        rows = torch.tensor(window_rows(exists, d, n, step_len, fill))
        if owns_values and not exists[d, n]:  # no sample
            rows[:] = -1
        expected_window = values[n, rows.clamp(min=0)].masked_fill((rows < 0)[:, None], NAN)
        assert same(x[k], expected_window), (d, n, rows)


def test_incomplete_windows_are_filled_per_batch_if_memory_is_short(monkeypatch):
    monkeypatch.setattr(gather, "EXTENSION_BYTES", 0)
    monkeypatch.setattr(gather, "EXTENSION_SHARE", 0.0)
    exists = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    values = torch.randn(3, 20, 2)
    date, instrument = torch.nonzero(exists, as_tuple=True)
    small = DensePackedColumns(values, history=exists, owns_values=True)
    assert small._get_window_starts(5, "ffill+bfill") is None
    monkeypatch.undo()
    large = DensePackedColumns(values, history=exists, owns_values=True)
    assert large._get_window_starts(5, "ffill+bfill") is not None
    for fill in FILLS:
        assert same(
            small.gather(date, instrument, 5, fill), large.gather(date, instrument, 5, fill)
        )


@pytest.mark.parametrize("fill", FILLS)
def test_late_listings_need_little_memory_and_no_copy_of_the_values(fill):
    num_dates, num_instruments, step_len = 60, 30, 10
    exists = torch.ones(num_dates, num_instruments, dtype=torch.bool)
    for k in range(num_instruments):
        exists[: k % 7, k] = False  # listed on different days
    exists[30, 4] = False  # one gap: the windows that contain it are stored one by one
    panel = Panel(
        torch.randn(num_dates, num_instruments, 3),
        pd.date_range("2020-01-01", periods=num_dates),
        [f"S{k}" for k in range(num_instruments)],
        ["a", "b", "c"],
    )
    pack = PanelColumns(panel, ["a", "c"]).pack(history=exists, step_len=step_len)
    address = pack.values.data_ptr()
    date, instrument = torch.nonzero(exists, as_tuple=True)
    starts = pack.window_starts(date, instrument, step_len, fill)
    assert starts is not None
    assert pack.values.data_ptr() == address
    num_extra_rows = pack._flat.shape[0] - num_dates * num_instruments
    num_gap_windows = step_len - 1
    assert num_extra_rows == 18 * num_instruments + step_len * (num_gap_windows + 1)
    expected_pack = DensePackedColumns(pack.values.clone(), history=exists)
    assert same(
        pack.windows(starts, step_len), expected_pack.gather(date, instrument, step_len, fill)
    )


def test_the_result_is_new_memory():
    pack = DensePackedColumns(torch.zeros(1, 4, 1))
    pack.gather(torch.tensor([3]), torch.tensor([0]), 2).fill_(7.0)
    pack.gather(torch.tensor([3]), torch.tensor([0]), 1).fill_(7.0)
    assert not pack.values.any()


def test_an_unknown_fill_is_named():
    with pytest.raises(ConfigError, match=r"unknown fillna_type 'bfill'.*'ffill'"):
        DensePackedColumns(torch.zeros(1, 4, 1)).gather(
            torch.tensor([3]), torch.tensor([0]), 2, "bfill"
        )


# -- real Qlib ---------------------------------------------------------------------------------

SEGMENTS = {
    "train": ("2020-01-01", "2020-02-14"),
    "test": ("2020-02-17", "2020-03-31"),
}
STEP_LEN = 8


def golden_frame(arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the stress frame that Qlib processed, stored beside Qlib's results."""
    index = pd.MultiIndex.from_arrays(
        [pd.DatetimeIndex(arrays["frame/date"]), arrays["frame/instrument"].astype(str)],
        names=["datetime", "instrument"],
    )
    columns = pd.MultiIndex.from_tuples(
        [("feature", "ROW"), ("feature", "HOLES"), ("label", "LABEL0")]
    )
    return pd.DataFrame(arrays["frame/values"], index=index, columns=columns)


def test_windows_equal_qlibs_golden_windows():
    with np.load(GOLDEN) as golden:
        qlib_windows = {name: golden[name] for name in golden.files}
    frame = golden_frame(qlib_windows)
    rows = parity.compare(frame, SEGMENTS, STEP_LEN, qlib_windows)
    assert {(r.segment, r.fill) for r in rows} == {(s, f) for s in SEGMENTS for f in FILLS}
    assert all(r.windows > 100 for r in rows)
    assert sum(r.different for r in rows) == 0


@pytest.mark.qlib
def test_windows_equal_those_of_real_qlib(tmp_path, qlib_python):
    frame = parity.stress_frame(num_dates=90, num_instruments=12, seed=3)
    segments = {**SEGMENTS, "later": ("2020-04-01", "2020-05-29")}
    windows = parity.qlib_windows(frame, segments, 11, qlib_python, tmp_path)
    assert not [r for r in parity.compare(frame, segments, 11, windows) if r.different]


def test_a_dropped_label_removes_a_sample_but_not_a_day_of_the_past():
    """Check the declared difference: Qlib's learn frame lacks the row, so its window is filled.

    One instrument has five days, and the label of day 2 is missing. Qlib's window of three steps
    that ends on day 3 consists of days 1 and 3 (day 2 filled from day 1): [1, 1, 3] with ffill.
    Here day 2 is no sample, but its features stay visible: [1, 2, 3].
    """
    days = pd.bdate_range("2020-01-06", periods=5)
    index = pd.MultiIndex.from_product([days, ["A", "B"]], names=["datetime", "instrument"])
    number = np.repeat(np.arange(5.0), 2)
    label = np.ones(10)
    label[4] = np.nan  # day 2 of A
    frame = pd.DataFrame({("feature", "F"): number, ("label", "L"): label}, index=index)
    view = view_from_frame(frame)
    learn = view.with_rows(view.rows & ~view.groups["label"].column("L").isnan())
    samples = build_samples(learn, step_len=3, fill="ffill", learn=True)
    assert len(samples) == 9
    position = samples.index.get_loc((days[3], "A"))
    assert samples.batch(torch.tensor([position])).x.flatten().tolist() == [1.0, 2.0, 3.0]
    qlib_like_samples = build_samples(view_from_frame(frame.dropna()), step_len=3, fill="ffill")
    position = qlib_like_samples.index.get_loc((days[3], "A"))
    assert qlib_like_samples.batch(torch.tensor([position])).x.flatten().tolist() == [1.0, 1.0, 3.0]


def test_a_panel_pack_gathers_the_same_windows():
    frame = parity.stress_frame(num_dates=25, num_instruments=5)
    view = view_from_frame(frame)
    columns = view.groups["feature"]
    assert isinstance(columns, PanelColumns)
    date, instrument = view.sample_rows()
    pack = columns.pack("cpu", history=view.history)
    x = pack.gather(date, instrument, 1, "none")[:, 0]
    assert same(x, torch.tensor(frame["feature"].to_numpy(np.float32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_pack_gathers_the_rounded_values(dtype):
    """Rounded once, after the chain; missing windows are filled and the rest is as in 32 bits."""
    num_dates, num_instruments, step_len = 40, 70, 5
    exists = (
        torch.rand(num_dates, num_instruments, generator=torch.Generator().manual_seed(0)) > 0.1
    )
    panel = Panel(
        torch.randn(num_dates, num_instruments, 3),
        pd.date_range("2020-01-01", periods=num_dates),
        [f"S{k}" for k in range(num_instruments)],
        ["a", "b", "c"],
    )
    columns = PanelColumns(panel, ["c", "a"]).with_columns({"a": panel.column("b") * 3})
    columns = columns.with_elementwise(["c", "a"], Affine(0.5, 3.0))
    full = columns.pack(history=exists, step_len=step_len)
    half = columns.pack(history=exists, step_len=step_len, dtype=dtype)
    assert half is not full
    assert columns.pack(history=exists, step_len=step_len, dtype=dtype) is half
    date, instrument = torch.nonzero(exists, as_tuple=True)
    for pack in (half, half.to(torch.device("cpu"), step_len)):
        assert pack.values.dtype == dtype
        assert pack.num_bytes <= full.num_bytes / 2 + 4096
        for fill in FILLS:
            expected = full.gather(date, instrument, step_len, fill).to(dtype).float()
            assert same(pack.gather(date, instrument, step_len, fill), expected)
            starts = pack.window_starts(date, instrument, step_len, fill)
            assert starts is not None
            windows = pack.windows(starts, step_len)
            assert windows.dtype == torch.float32
            assert same(windows, expected)
