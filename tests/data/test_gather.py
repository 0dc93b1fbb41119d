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
from qtorch.data import gather
from qtorch.data.columns import PanelColumns
from qtorch.data.foreign import view_of_frame
from qtorch.data.gather import FILLS, DensePacked
from qtorch.data.samples import build_samples

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import windows as parity  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "qlib_windows.npz"
NAN = float("nan")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def by_hand(exists: np.ndarray, date: int, who: int, step_len: int, fill: str) -> list[int]:
    """A window's rows one by one: -1 is missing."""
    days = [d for d in range(len(exists)) if exists[d].any() and d <= date]
    rows = [-1] * max(0, step_len - len(days)) + days[-step_len:]
    rows = [d if d >= 0 and exists[d, who] else -1 for d in rows]
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
    own=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_windows_are_those_worked_out_row_by_row(
    num_dates, num_instruments, step_len, fill, missing, own, seed
):
    rng = np.random.default_rng(seed)
    exists = rng.random((num_dates, num_instruments)) >= missing
    values = torch.arange(num_instruments * num_dates * 2.0).view(num_instruments, num_dates, 2)
    values = torch.where(torch.from_numpy(exists.T)[..., None], values, 1e6)  # must not show
    packed = DensePacked(values, history=torch.from_numpy(exists), own=own)
    cells = [(d, n) for d in range(num_dates) for n in range(num_instruments)]
    date, who = (torch.tensor(part) for part in zip(*cells, strict=True))
    x = packed.gather(date, who, step_len, fill)
    assert x.shape == (len(cells), step_len, 2)
    for k, (d, n) in enumerate(cells):
        rows = torch.tensor(by_hand(exists, d, n, step_len, fill))
        if own and not exists[d, n]:  # no sample
            rows[:] = -1
        expected = values[n, rows.clamp(min=0)].masked_fill((rows < 0)[:, None], NAN)
        assert same(x[k], expected), (d, n, rows)


def test_incomplete_windows_that_take_too_much_memory_are_mended_by_batch(monkeypatch):
    monkeypatch.setattr(gather, "EXTENSION_BYTES", 0)
    monkeypatch.setattr(gather, "EXTENSION_SHARE", 0.0)
    exists = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    values = torch.randn(3, 20, 2)
    date, who = torch.nonzero(exists, as_tuple=True)
    small = DensePacked(values, history=exists, own=True)
    assert small._starts_of(5, "ffill+bfill") is None
    monkeypatch.undo()
    large = DensePacked(values, history=exists, own=True)
    assert large._starts_of(5, "ffill+bfill") is not None
    for fill in FILLS:
        assert same(small.gather(date, who, 5, fill), large.gather(date, who, 5, fill))


def test_the_result_is_new_memory():
    packed = DensePacked(torch.zeros(1, 4, 1))
    packed.gather(torch.tensor([3]), torch.tensor([0]), 2).fill_(7.0)
    packed.gather(torch.tensor([3]), torch.tensor([0]), 1).fill_(7.0)
    assert not packed.values.any()


def test_an_unknown_fill_is_named():
    with pytest.raises(ConfigError, match=r"unknown fillna_type 'bfill'.*'ffill'"):
        DensePacked(torch.zeros(1, 4, 1)).gather(torch.tensor([3]), torch.tensor([0]), 2, "bfill")


# -- real Qlib ---------------------------------------------------------------------------------

SEGMENTS = {
    "train": ("2020-01-01", "2020-02-14"),
    "test": ("2020-02-17", "2020-03-31"),
}
STEP_LEN = 8


def golden_frame(arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    """The stress frame that Qlib was given, kept beside what it answered."""
    index = pd.MultiIndex.from_arrays(
        [pd.DatetimeIndex(arrays["frame/date"]), arrays["frame/instrument"].astype(str)],
        names=["datetime", "instrument"],
    )
    columns = pd.MultiIndex.from_tuples(
        [("feature", "ROW"), ("feature", "HOLES"), ("label", "LABEL0")]
    )
    return pd.DataFrame(arrays["frame/values"], index=index, columns=columns)


def test_windows_are_qlibs_golden():
    with np.load(GOLDEN) as golden:
        theirs = {name: golden[name] for name in golden.files}
    frame = golden_frame(theirs)
    rows = parity.compare(frame, SEGMENTS, STEP_LEN, theirs)
    assert {(r.segment, r.fill) for r in rows} == {(s, f) for s in SEGMENTS for f in FILLS}
    assert all(r.windows > 100 for r in rows)
    assert sum(r.different for r in rows) == 0


@pytest.mark.qlib
def test_windows_are_those_of_real_qlib(tmp_path, qlib_python):
    frame = parity.stress_frame(num_dates=90, num_instruments=12, seed=3)
    segments = {**SEGMENTS, "later": ("2020-04-01", "2020-05-29")}
    theirs = parity.qlib_windows(frame, segments, 11, qlib_python, tmp_path)
    assert not [r for r in parity.compare(frame, segments, 11, theirs) if r.different]


def test_a_dropped_label_takes_a_sample_away_and_not_a_day_of_the_past():
    """The declared difference: Qlib's learn frame lacks the row, so that its window is filled.

    Five days of one instrument, the label of day 2 is missing. Qlib's window of three steps that
    ends on day 3 is made of days 1 and 3 (day 2 filled from day 1): [1, 1, 3] with ffill. Here
    day 2 is no sample, but what happened on it stays visible: [1, 2, 3].
    """
    days = pd.bdate_range("2020-01-06", periods=5)
    index = pd.MultiIndex.from_product([days, ["A", "B"]], names=["datetime", "instrument"])
    number = np.repeat(np.arange(5.0), 2)
    label = np.ones(10)
    label[4] = np.nan  # day 2 of A
    frame = pd.DataFrame({("feature", "F"): number, ("label", "L"): label}, index=index)
    whole = view_of_frame(frame)
    learn = whole.with_rows(whole.rows & ~whole.groups["label"].column("L").isnan())
    ours = build_samples(learn, step_len=3, fill="ffill", learn=True)
    assert len(ours) == 9
    at = ours.index.get_loc((days[3], "A"))
    assert ours.batch(torch.tensor([at])).x.flatten().tolist() == [1.0, 2.0, 3.0]
    dropped = build_samples(view_of_frame(frame.dropna()), step_len=3, fill="ffill")
    at = dropped.index.get_loc((days[3], "A"))
    assert dropped.batch(torch.tensor([at])).x.flatten().tolist() == [1.0, 1.0, 3.0]


def test_a_panel_pack_goes_through_the_same_windows():
    frame = parity.stress_frame(num_dates=25, num_instruments=5)
    view = view_of_frame(frame)
    columns = view.groups["feature"]
    assert isinstance(columns, PanelColumns)
    date, who = view.sample_rows()
    packed = columns.pack("cpu", history=view.history)
    x = packed.gather(date, who, 1, "none")[:, 0]
    assert same(x, torch.tensor(frame["feature"].to_numpy(np.float32)))
