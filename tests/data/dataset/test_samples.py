from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset.qlib_dataset import get_samples
from qtorch.data.dataset.reweighter import Reweighter
from qtorch.data.dataset.samples import (
    CELL_BYTES,
    Samples,
    build_samples,
    check_segments,
    purge_rows,
)
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.elementwise import Affine
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View

D, N = 20, 4
DATES = pd.bdate_range("2020-01-01", periods=D)
NAN, INF = float("nan"), float("inf")


def make_view(
    cells: Mapping[tuple[str, int, int], float] | None = None, instruments: int = N
) -> tuple[View, PanelColumns]:
    """Build a view with two features and a processed label (raw - 1), and its raw label."""
    torch.manual_seed(0)
    values = torch.randn(D, instruments, 3)
    names = ["F0", "F1", "L"]
    for (name, d, n), value in (cells or {}).items():
        values[d, n, names.index(name)] = value
    panel = Panel(values, DATES, [f"I{k}" for k in range(instruments)], names)
    exists = torch.ones(D, instruments, dtype=torch.bool)
    raw = PanelColumns(panel, ["L"])
    groups = {
        "feature": PanelColumns(panel, ["F0", "F1"]),
        "label": raw.with_elementwise(["L"], Affine(1.0)),
    }
    return View(groups, rows=exists, history=exists), raw


def test_samples_are_the_rows_of_the_segment_in_order():
    view, raw = make_view()
    samples = build_samples(view, start="2020-01-06", end="2020-01-10", raw_label=raw, step_len=3)
    expected_frame = view.frame(start="2020-01-06", end="2020-01-10")
    pd.testing.assert_index_equal(samples.index, expected_frame.index)
    assert len(samples) == 5 * N
    assert (samples.num_days, samples.num_features, samples.num_steps) == (5, 2, 3)
    batch = samples.batch(torch.arange(len(samples)))
    assert batch.x.shape == (20, 3, 2)
    np.testing.assert_array_equal(batch.x[:, -1], expected_frame["feature"].to_numpy())
    np.testing.assert_array_equal(batch.y, expected_frame["label"].to_numpy())
    torch.testing.assert_close(batch.extra["raw_label"], batch.y + 1)
    earlier = view.frame(start="2020-01-02", end="2020-01-08")["feature"].to_numpy()
    np.testing.assert_array_equal(batch.x[:, 0], earlier)  # windows reach before the segment


def test_a_batch_of_one_and_a_padded_batch():
    samples = build_samples(make_view()[0], step_len=2)
    single = samples.batch(torch.tensor([7]))
    assert (single.x.shape, single.y.shape, single.mask) == ((1, 2, 2), (1, 1), None)
    padded = samples.batch(torch.tensor([7, 3]), size=4)
    assert padded.x.shape == (4, 2, 2)
    assert padded.mask.tolist() == [True, True, False, False]
    assert padded.num_samples == 2
    assert padded.y[2:].isnan().all()
    assert (padded.x[2:] == 0).all()
    torch.testing.assert_close(padded.x[0], single.x[0])


def test_a_day_batch_is_exactly_one_days_universe():
    view, raw = make_view()
    rows = view.rows.clone()
    rows[3, 1:] = False
    rows[5] = False
    samples = build_samples(view.with_rows(rows), raw_label=raw)
    assert samples.num_days == D - 1
    batch = samples.day_batch(torch.tensor([3, 5]))
    assert batch.x.shape[:2] == batch.mask.shape == (2, N)
    assert batch.is_day
    assert batch.num_samples == 1 + N
    assert batch.mask.sum(1).tolist() == [1, N]
    assert batch.date[0, 0] == 3
    assert (batch.date[1] == 6).all()  # day 5 has no samples
    assert batch.instrument[1].tolist() == [0, 1, 2, 3]
    assert batch.y[0, 1:].isnan().all()
    assert batch.extra["raw_label"][0, 1:].isnan().all()
    assert (batch.x[0, 1:] == 0).all()
    flat = batch.flatten()
    assert flat.x.shape == (2 * N, 1, 2)
    padded = samples.day_batch(torch.tensor([3]), num_days=3)
    assert padded.mask.sum() == 1
    assert padded.x.shape[0] == 3


def test_day_batches_have_few_distinct_widths():
    torch.manual_seed(0)
    panel = Panel(
        torch.randn(40, 60, 1), pd.bdate_range("2020", periods=40), map(str, range(60)), ["F"]
    )
    rows = torch.rand(40, 60) < torch.linspace(0.05, 1.0, 40)[:, None]
    samples = build_samples(View({"feature": PanelColumns(panel)}, rows, rows))
    batches = [samples.day_batch(torch.tensor([k])) for k in range(samples.num_days)]
    widths = {b.x.shape[1] for b in batches}
    assert len(widths) <= 8
    assert max(widths) == int(rows.sum(1).max())
    assert sum(int(b.mask.sum()) for b in batches) == len(samples)


# -- excluded samples --------------------------------------------------------------------------


def test_samples_whose_label_reaches_the_next_segment_are_purged(caplog):
    view, _ = make_view()
    with caplog.at_level(logging.INFO, "qtorch"):
        samples = build_samples(
            view,
            end="2020-01-10",
            name="train",
            horizon=2,
            later_starts=["2020-01-13", "2020-01-20"],
            learn=True,
        )
    assert samples.index.get_level_values(0).max() == pd.Timestamp("2020-01-08")
    assert samples.describe()["purged"] == 2 * N
    assert f"train: {len(samples)} samples with labels" in caplog.text
    assert "train: purged 8 samples" in caplog.text
    with caplog.at_level(logging.INFO, "qtorch"):
        assert len(build_samples(view, end="2020-01-10", name="test")) == len(samples) + 2 * N
    assert f"test: {len(samples) + 2 * N} samples to score" in caplog.text


def test_rows_without_a_label_are_left_out_for_learning(caplog):
    view, raw = make_view({("L", 4, 1): NAN, ("L", 4, 2): NAN})
    with caplog.at_level(logging.INFO, "qtorch"):
        learn = build_samples(view, raw_label=raw, learn=True)
    assert "left out 2 rows without a label" in caplog.text
    assert len(learn) == D * N - 2
    assert not learn.target.isnan().any()
    assert learn.raw_label.shape == learn.target.shape
    assert len(build_samples(view, raw_label=raw)) == D * N  # for prediction every row is a sample


def test_a_row_with_some_labels_is_kept():
    view, _ = make_view({("L", 4, 1): NAN})
    label = view.groups["label"].with_columns({"SECOND": torch.ones(D, N)})
    samples = build_samples(view.with_group("label", label), learn=True)
    assert len(samples) == D * N
    assert samples.target.shape == (D * N, 2)
    assert int(samples.target.isnan().sum()) == 1


def test_windows_include_rows_that_are_not_samples():
    view, _ = make_view()
    rows = view.rows.clone()
    rows[5, 0] = False
    samples = build_samples(view.with_rows(rows), step_len=2, fill="none")
    at = samples.index.get_loc((DATES[6], "I0"))
    x = samples.batch(torch.tensor([at])).x
    assert (DATES[5], "I0") not in samples.index
    assert x[0, 0, 0] == view.groups["feature"].column("F0")[5, 0]


def test_a_mask_restricts_the_rows():
    view, _ = make_view()
    mask = torch.zeros(D, N, dtype=torch.bool)
    mask[:, 2] = True
    samples = build_samples(view, rows=mask)
    assert samples.instrument.unique().tolist() == [2]
    assert samples.describe()["purged"] == 0


# -- errors and edge cases ---------------------------------------------------------------------


def test_an_empty_segment_error_describes_the_data():
    with pytest.raises(DataError, match=r"test \(2031-01-01..None\) has no samples.*2020-01-01"):
        build_samples(make_view()[0], start="2031-01-01", name="test")
    with pytest.raises(DataError, match="8 samples were purged"):
        build_samples(
            make_view()[0],
            start="2020-01-09",
            end="2020-01-10",
            horizon=5,
            later_starts=["2020-01-13"],
            learn=True,
        )


def test_a_label_that_is_nan_everywhere_is_refused():
    view, _ = make_view()
    nan_label = view.groups["label"].with_columns({"L": torch.full((D, N), NAN)})
    with pytest.raises(DataError, match=r"train .*label \['L'\] is NaN in all 80 samples"):
        build_samples(view.with_group("label", nan_label), name="train", learn=True)


def test_infinite_features_and_labels_are_refused_with_a_fix():
    view, _ = make_view({("F1", 3, 2): INF})
    samples = build_samples(view)
    with pytest.raises(DataError, match=r"infinite values in the features: F1.*ProcessInf"):
        samples.to("cpu")
    with pytest.raises(DataError, match="infinite values in the features: F1"):
        samples.batch(torch.tensor([0]))
    view, raw = make_view({("L", 3, 2): -INF})
    with pytest.raises(DataError, match="infinite values in the labels: L"):
        build_samples(view, learn=True)
    # Infinite labels become NaN for prediction.
    samples_for_prediction = build_samples(view, raw_label=raw)
    assert int(samples_for_prediction.raw_label.isnan().sum()) == 1
    assert int(samples_for_prediction.target.isnan().sum()) == 1


def test_without_a_label_group_there_is_no_target():
    view, _ = make_view()
    view_without_label = View({"feature": view.groups["feature"]}, view.rows, view.history)
    batch = build_samples(view_without_label).batch(torch.tensor([0]))
    assert batch.y is None
    assert batch.extra == {}


def test_samples_of_one_instrument():
    samples = build_samples(make_view(instruments=1)[0], step_len=3, learn=True)
    assert len(samples) == D
    assert samples.day_batch(torch.tensor([4])).x.shape == (1, 1, 3, 2)


@pytest.mark.parametrize("options", [{"step_len": 0}, {"fill": "bfill"}])
def test_invalid_options_are_refused(options):
    with pytest.raises(ConfigError):
        build_samples(make_view()[0], **options)


# -- devices, weights, dispatch ----------------------------------------------------------------


def test_every_store_gives_the_same_batches():
    view, raw = make_view()
    samples = build_samples(view, raw_label=raw, step_len=3)
    rows = torch.tensor([5, 70, 11])
    expected_batch = samples.batch(rows)
    for store in ("auto", "device", "host"):
        moved_samples = samples.to("cpu", store=store)
        assert moved_samples.store == ("host" if store == "host" else "device")
        batch = moved_samples.batch(rows)
        for name in ("x", "y", "date", "instrument"):
            assert torch.equal(getattr(batch, name), getattr(expected_batch, name))
        assert moved_samples.describe() == samples.describe()
    with pytest.raises(ConfigError, match="unknown store 'gpu'"):
        samples.to("cpu", store="gpu")


def test_features_that_do_not_fit_stay_in_host_memory(monkeypatch, caplog):
    samples = build_samples(make_view()[0], step_len=3)
    pack, calls = Samples._pack, []

    def pack_without_memory(self, device):
        calls.append(device)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pack(self, device)

    monkeypatch.setattr(Samples, "_pack", pack_without_memory)
    assert samples.to("cpu").store == "host"
    assert "in host memory: they did not fit into the memory of cpu" in caplog.text
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        samples.to("cpu", store="device")


def test_segments_that_share_a_pack_share_its_device_memory(monkeypatch):
    view, raw = make_view()
    view = view.with_group("feature", view.groups["feature"].keep(["F1"]))  # a copy when packed
    train, valid = (build_samples(view, raw_label=raw, end=end) for end in DATES[[9, 19]])
    size = (4 + CELL_BYTES) * D * N
    free = [2 * size]
    monkeypatch.setattr("qtorch.data.dataset.samples.free_bytes", lambda device: free[0])
    train = train.to("cpu")
    free[0] -= size
    valid = valid.to("cpu")
    assert (train.store, valid.store) == ("device", "device")
    assert valid.feature_pack is train.feature_pack
    assert valid.to("cpu").store == "device"
    other_samples = build_samples(view.with_group("feature", raw), raw_label=raw)
    assert other_samples.to("cpu").store == "host"  # other features do not fit any more


def test_16_bit_features_take_half_the_memory(monkeypatch):
    view, raw = make_view()
    full, half = (
        build_samples(view, raw_label=raw, step_len=3, feature_dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    rows = torch.arange(len(full))
    assert torch.equal(half.batch(rows).x, full.batch(rows).x.half().float())
    assert torch.equal(half.batch(rows).y, full.batch(rows).y)
    assert half.num_feature_bytes < 0.6 * full.num_feature_bytes
    # Half as much memory is enough to have them on the device.
    view, raw = make_view()
    free = (2 * 2 + CELL_BYTES) * D * N / 0.6 + 64
    monkeypatch.setattr("qtorch.data.dataset.samples.free_bytes", lambda device: free)
    stores = [
        build_samples(view, raw_label=raw, feature_dtype=dtype).to("cpu").store
        for dtype in (torch.float16, torch.float32)
    ]
    assert stores == ["device", "host"]


def test_numbers_that_float16_does_not_hold_are_an_error():
    view, raw = make_view({("F1", 3, 1): 1e5})
    samples = build_samples(view, raw_label=raw, feature_dtype=torch.bfloat16)
    assert samples.batch(torch.arange(4)).x.isfinite().all()
    samples = build_samples(view, raw_label=raw, feature_dtype=torch.float16)
    with pytest.raises(DataError, match=r"beyond 65504, or infinite, .*: F1\. .*bfloat16"):
        samples.batch(torch.arange(4))


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_of_the_cpu():
    view, raw = make_view()
    history = view.history.clone()
    history[7, 2] = False
    view = View(view.groups, rows=view.rows & history, history=history)
    samples = build_samples(view, raw_label=raw, step_len=4)
    rows = torch.randperm(len(samples))
    expected_batch = samples.batch(rows)
    for store in ("device", "host"):
        moved_samples = samples.to("cuda", store=store)
        batch = moved_samples.batch(rows.to(moved_samples.index_device))
        batch = moved_samples.send_to_device(batch) if store == "host" else batch
        assert batch.x.is_cuda
        torch.testing.assert_close(batch.x.cpu(), expected_batch.x, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(batch.y.cpu(), expected_batch.y, rtol=0, atol=0, equal_nan=True)


class LabelSize(Reweighter):
    """Use the label's absolute value as weight."""

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        return data["label", "L"].abs()


def test_batches_contain_the_weights():
    samples = build_samples(make_view()[0], learn=True)
    weighted_samples = samples.apply_reweighter(LabelSize())
    assert samples.weight is None
    rows = torch.tensor([3, 60])
    batch = weighted_samples.batch(rows)
    torch.testing.assert_close(batch.weight, batch.y[:, 0].abs())
    assert torch.equal(batch.x, samples.batch(rows).x)
    assert weighted_samples.day_batch(torch.tensor([0])).weight.shape == (1, N)
    assert weighted_samples.batch(rows, size=3).weight[2] == 0
    assert samples.apply_reweighter(None) is samples
    with pytest.raises(ConfigError, match="int is not a reweighter"):
        samples.apply_reweighter(3)


def test_frame_returns_the_samples_own_rows():
    view, raw = make_view()
    samples = build_samples(view, raw_label=raw, step_len=3)
    frame = samples.frame(("feature", "label", "raw_label"))
    pd.testing.assert_frame_equal(
        frame[["feature", "label"]], view.frame(), check_column_type=False
    )
    assert list(frame.columns.get_level_values(0).unique()) == ["feature", "label", "raw_label"]


class UserDataset:
    """A dataset with its own `samples` method."""

    def samples(self, segment, *, data_key, purge):
        result = build_samples(make_view()[0], step_len=2)
        result.notes["arguments"] = (segment, data_key, purge)
        return result


def test_get_samples_calls_the_method_of_a_qtorch_dataset():
    def arguments(segment: str, **options: Any) -> tuple[Any, ...]:
        return get_samples(UserDataset(), segment, **options).notes["arguments"]

    assert arguments("train", data_key="learn") == ("train", "learn", True)
    assert arguments("train", data_key="learn", purge=False) == ("train", "learn", False)
    assert arguments("test") == ("test", "infer", False)


def test_a_label_two_days_ahead_purges_two_days():
    # Rows 0..9, the next segment begins at row 10: the label of row 8 is known at row 10.
    assert purge_rows(slice(0, 10), [10], 2) == slice(0, 8)
    # With a gap of one row between the segments, only the last row's label reaches across it.
    assert purge_rows(slice(0, 10), [11], 2) == slice(0, 9)
    assert purge_rows(slice(0, 10), [12], 2) == slice(0, 10)
    # Earlier segments, and the segment itself, purge nothing.
    assert purge_rows(slice(5, 10), [0, 5], 2) == slice(5, 10)
    assert purge_rows(slice(0, 10), [10], 0) == slice(0, 10)
    assert purge_rows(slice(0, 3), [3], 7) == slice(0, 0)


@given(
    start=st.integers(0, 30),
    length=st.integers(0, 30),
    starts=st.lists(st.integers(0, 80), max_size=4),
    horizon=st.integers(0, 20),
)
def test_labels_of_the_remaining_rows_reach_no_later_segment(start, length, starts, horizon):
    rows = slice(start, start + length)
    remaining = purge_rows(rows, starts, horizon)
    expected_rows = [
        d
        for d in range(rows.start, rows.stop)
        if not any(s >= rows.stop and d + horizon >= s for s in starts) or horizon == 0
    ]
    assert list(range(remaining.start, remaining.stop)) == expected_rows


def test_overlapping_segments_are_refused():
    check_segments({"train": ("2008-01-01", "2014-12-31"), "valid": ("2015-01-01", None)})
    with pytest.raises(ConfigError, match=r"'train' \(to 2015-01-01\) and 'valid' \(from 2015-01"):
        check_segments(
            {"valid": ("2015-01-01", "2015-12-31"), "train": ("2008-01-01", "2015-01-01")}
        )
    with pytest.raises(ConfigError, match="overlap"):
        check_segments({"train": (None, None), "test": ("2016-01-01", None)})
    with pytest.raises(ConfigError, match=r"ends .* before it starts"):
        check_segments({"train": ("2015-01-01", "2014-01-01")})
    with pytest.raises(
        ConfigError, match=r"segment 'valid' \(2015-01-01\.\.abc\): 'abc' is not a date"
    ):
        check_segments({"valid": ("2015-01-01", "abc")})
