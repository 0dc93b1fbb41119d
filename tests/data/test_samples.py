from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.columns import PanelColumns
from qtorch.data.elementwise import Affine
from qtorch.data.panel import Panel
from qtorch.data.reweighter import Reweighter
from qtorch.data.samples import Samples, build_samples, samples_of
from qtorch.data.view import View

D, N = 20, 4
DATES = pd.bdate_range("2020-01-01", periods=D)
NAN, INF = float("nan"), float("inf")


def view(
    cells: Mapping[tuple[str, int, int], float] | None = None, instruments: int = N
) -> tuple[View, PanelColumns]:
    """A view with two features and a processed label (raw - 1); the raw label's columns."""
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
    made, raw = view()
    samples = build_samples(made, start="2020-01-06", end="2020-01-10", raw_label=raw, step_len=3)
    expected = made.frame(start="2020-01-06", end="2020-01-10")
    pd.testing.assert_index_equal(samples.index, expected.index)
    assert len(samples) == 5 * N
    assert (samples.num_days, samples.num_features, samples.num_steps) == (5, 2, 3)
    batch = samples.batch(torch.arange(len(samples)))
    assert batch.x.shape == (20, 3, 2)
    np.testing.assert_array_equal(batch.x[:, -1], expected["feature"].to_numpy())
    np.testing.assert_array_equal(batch.y, expected["label"].to_numpy())
    torch.testing.assert_close(batch.extra["raw_label"], batch.y + 1)
    earlier = made.frame(start="2020-01-02", end="2020-01-08")["feature"].to_numpy()
    np.testing.assert_array_equal(batch.x[:, 0], earlier)  # windows reach before the segment


def test_a_batch_of_one_and_a_padded_batch():
    samples = build_samples(view()[0], step_len=2)
    one = samples.batch(torch.tensor([7]))
    assert (one.x.shape, one.y.shape, one.mask) == ((1, 2, 2), (1, 1), None)
    padded = samples.batch(torch.tensor([7, 3]), size=4)
    assert padded.x.shape == (4, 2, 2)
    assert padded.mask.tolist() == [True, True, False, False]
    assert padded.num_samples == 2
    assert padded.y[2:].isnan().all()
    assert (padded.x[2:] == 0).all()
    torch.testing.assert_close(padded.x[0], one.x[0])


def test_a_day_batch_is_exactly_one_days_universe():
    made, raw = view()
    rows = made.rows.clone()
    rows[3, 1:] = False
    rows[5] = False
    samples = build_samples(made.with_rows(rows), raw_label=raw)
    assert samples.num_days == D - 1
    batch = samples.day_batch(torch.tensor([3, 5]))
    assert batch.x.shape[:2] == batch.mask.shape == (2, N)
    assert batch.is_day
    assert batch.num_samples == 1 + N
    assert batch.mask.sum(1).tolist() == [1, N]
    assert batch.date[0, 0] == 3
    assert (batch.date[1] == 6).all()  # day 5 holds no sample
    assert batch.instrument[1].tolist() == [0, 1, 2, 3]
    assert batch.y[0, 1:].isnan().all()
    assert batch.extra["raw_label"][0, 1:].isnan().all()
    assert (batch.x[0, 1:] == 0).all()
    flat = batch.flat()
    assert flat.x.shape == (2 * N, 1, 2)
    padded = samples.day_batch(torch.tensor([3]), num_days=3)
    assert padded.mask.sum() == 1
    assert padded.x.shape[0] == 3


def test_few_widths_of_day_batches():
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


# -- what is left out --------------------------------------------------------------------------


def test_samples_whose_label_reaches_the_next_segment_are_purged(caplog):
    made, _ = view()
    with caplog.at_level(logging.INFO, "qtorch"):
        samples = build_samples(
            made,
            end="2020-01-10",
            name="train",
            horizon=2,
            later_starts=["2020-01-13", "2020-01-20"],
            learn=True,
        )
    assert samples.index.get_level_values(0).max() == pd.Timestamp("2020-01-08")
    assert samples.describe()["purged"] == 2 * N
    assert "train: 8 samples purged" in caplog.text
    assert len(build_samples(made, end="2020-01-10")) == len(samples) + 2 * N


def test_rows_without_label_are_no_samples_for_learning(caplog):
    made, raw = view({("L", 4, 1): NAN, ("L", 4, 2): NAN})
    with caplog.at_level(logging.INFO, "qtorch"):
        learn = build_samples(made, raw_label=raw, learn=True)
    assert "2 rows without label left out" in caplog.text
    assert len(learn) == D * N - 2
    assert not learn.target.isnan().any()
    assert learn.raw_label.shape == learn.target.shape
    assert len(build_samples(made, raw_label=raw)) == D * N  # for prediction every row counts


def test_a_row_with_some_of_its_labels_stays():
    made, _ = view({("L", 4, 1): NAN})
    label = made.groups["label"].with_columns({"SECOND": torch.ones(D, N)})
    samples = build_samples(made.with_group("label", label), learn=True)
    assert len(samples) == D * N
    assert samples.target.shape == (D * N, 2)
    assert int(samples.target.isnan().sum()) == 1


def test_windows_see_rows_that_are_no_samples():
    made, _ = view()
    rows = made.rows.clone()
    rows[5, 0] = False
    samples = build_samples(made.with_rows(rows), step_len=2, fill="none")
    at = samples.index.get_loc((DATES[6], "I0"))
    x = samples.batch(torch.tensor([at])).x
    assert (DATES[5], "I0") not in samples.index
    assert x[0, 0, 0] == made.groups["feature"].column("F0")[5, 0]


def test_a_mask_narrows_the_rows():
    made, _ = view()
    mask = torch.zeros(D, N, dtype=torch.bool)
    mask[:, 2] = True
    samples = build_samples(made, rows=mask)
    assert samples.instrument.unique().tolist() == [2]
    assert samples.describe()["purged"] == 0


# -- what cannot be meant ----------------------------------------------------------------------


def test_an_empty_segment_says_what_is_there():
    with pytest.raises(DataError, match=r"test \(2031-01-01..None\) holds no sample.*2020-01-01"):
        build_samples(view()[0], start="2031-01-01", name="test")
    with pytest.raises(DataError, match="8 samples were purged"):
        build_samples(
            view()[0],
            start="2020-01-09",
            end="2020-01-10",
            horizon=5,
            later_starts=["2020-01-13"],
            learn=True,
        )


def test_a_label_that_is_nan_everywhere():
    made, _ = view()
    nothing = made.groups["label"].with_columns({"L": torch.full((D, N), NAN)})
    with pytest.raises(DataError, match=r"train .*label \['L'\] is NaN in all 80 samples"):
        build_samples(made.with_group("label", nothing), name="train", learn=True)


def test_infinite_features_and_labels_are_named_with_the_mend():
    made, _ = view({("F1", 3, 2): INF})
    samples = build_samples(made)
    with pytest.raises(DataError, match=r"infinite values in the features: F1.*ProcessInf"):
        samples.to("cpu")
    with pytest.raises(DataError, match="infinite values in the features: F1"):
        samples.batch(torch.tensor([0]))
    made, raw = view({("L", 3, 2): -INF})
    with pytest.raises(DataError, match="infinite values in the labels: L"):
        build_samples(made, learn=True)
    told = build_samples(made, raw_label=raw)  # unknown, not an error, where nothing is learnt
    assert int(told.raw_label.isnan().sum()) == int(told.target.isnan().sum()) == 1


def test_no_label_group_no_target():
    made, _ = view()
    alone = View({"feature": made.groups["feature"]}, made.rows, made.history)
    batch = build_samples(alone).batch(torch.tensor([0]))
    assert batch.y is None
    assert batch.extra == {}


def test_one_instrument_works():
    samples = build_samples(view(instruments=1)[0], step_len=3, learn=True)
    assert len(samples) == D
    assert samples.day_batch(torch.tensor([4])).x.shape == (1, 1, 3, 2)


@pytest.mark.parametrize("options", [{"step_len": 0}, {"fill": "bfill"}])
def test_options_that_cannot_be_meant(options):
    with pytest.raises(ConfigError):
        build_samples(view()[0], **options)


# -- devices, weights, dispatch ----------------------------------------------------------------


def test_moving_keeps_everything_and_the_host_store_gives_the_same_batches():
    made, raw = view()
    samples = build_samples(made, raw_label=raw, step_len=3)
    rows = torch.tensor([5, 70, 11])
    expected = samples.batch(rows)
    for store in ("auto", "device", "host"):
        moved = samples.to("cpu", store=store)
        assert moved.store == ("host" if store == "host" else "device")
        batch = moved.batch(rows)
        for name in ("x", "y", "date", "instrument"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
        assert moved.describe() == samples.describe()
    with pytest.raises(ConfigError, match="unknown store 'gpu'"):
        samples.to("cpu", store="gpu")


def test_segments_that_share_a_pack_are_on_the_device_together(monkeypatch):
    made, raw = view()
    made = made.with_group("feature", made.groups["feature"].keep(["F1"]))  # a copy when packed
    train, valid = (build_samples(made, raw_label=raw, end=end) for end in DATES[[9, 19]])
    size = 4 * D * N
    free = [2 * size]
    monkeypatch.setattr("qtorch.data.placement.free_bytes", lambda device: free[0])
    train = train.to("cpu")
    free[0] -= size
    valid = valid.to("cpu")
    assert (train.store, valid.store) == ("device", "device")
    assert valid.packed is train.packed
    assert valid.to("cpu").store == "device"
    other = build_samples(made.with_group("feature", raw), raw_label=raw)
    assert other.to("cpu").store == "host"  # features of its own have no room any more


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_of_the_cpu():
    made, raw = view()
    history = made.history.clone()
    history[7, 2] = False
    made = View(made.groups, rows=made.rows & history, history=history)
    samples = build_samples(made, raw_label=raw, step_len=4)
    rows = torch.randperm(len(samples))
    expected = samples.batch(rows)
    for store in ("device", "host"):
        moved = samples.to("cuda", store=store)
        batch = moved.batch(rows.to(moved.index_device))
        batch = moved.sent(batch) if store == "host" else batch
        assert batch.x.is_cuda
        torch.testing.assert_close(batch.x.cpu(), expected.x, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(batch.y.cpu(), expected.y, rtol=0, atol=0, equal_nan=True)


class LabelSize(Reweighter):
    """The label's size as weight."""

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        return data["label", "L"].abs()


def test_weights_reach_the_batches():
    samples = build_samples(view()[0], learn=True)
    weighted = samples.reweighted(LabelSize())
    assert samples.weight is None
    rows = torch.tensor([3, 60])
    batch = weighted.batch(rows)
    torch.testing.assert_close(batch.weight, batch.y[:, 0].abs())
    assert torch.equal(batch.x, samples.batch(rows).x)
    assert weighted.day_batch(torch.tensor([0])).weight.shape == (1, N)
    assert weighted.batch(rows, size=3).weight[2] == 0
    assert samples.reweighted(None) is samples
    with pytest.raises(ConfigError, match="int is no reweighter"):
        samples.reweighted(3)


def test_frames_of_the_samples_own_rows():
    made, raw = view()
    samples = build_samples(made, raw_label=raw, step_len=3)
    frame = samples.frame(("feature", "label", "raw_label"))
    pd.testing.assert_frame_equal(
        frame[["feature", "label"]], made.frame(), check_column_type=False
    )
    assert list(frame.columns.get_level_values(0).unique()) == ["feature", "label", "raw_label"]


class Own:
    """A dataset that answers itself."""

    def samples(self, segment, *, data_key, purge):
        made = build_samples(view()[0], step_len=2)
        made.notes["asked"] = (segment, data_key, purge)
        return made


def test_a_qtorch_dataset_answers_itself():
    assert samples_of(Own(), "train", data_key="learn").notes["asked"] == ("train", "learn", True)
    assert samples_of(Own(), "test").notes["asked"] == ("test", "infer", False)
    assert samples_of(Own(), "train", data_key="learn", purge=False).notes["asked"][2] is False
    assert isinstance(samples_of(Own(), "x"), Samples)
