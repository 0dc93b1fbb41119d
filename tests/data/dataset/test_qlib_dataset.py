from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset.qlib_dataset import as_samples, get_samples
from qtorch.model import LightningModel

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import windows as parity  # noqa: E402

SPAN = slice("2020-01-20", "2020-02-28")


@pytest.fixture
def frame() -> pd.DataFrame:
    return parity.stress_frame(num_dates=45, num_instruments=5)


class FrameDataset:
    """The part of Qlib's DatasetH that qtorch uses: segments, a handler, prepare."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.segments = {"train": ("2020-01-01", "2020-01-17"), "test": (SPAN.start, SPAN.stop)}
        self.handler = SimpleNamespace(fetch=self.fetch, get_cols=lambda col_set: ["LABEL0"])
        self.requested_keys: list[str] = []

    def prepare(self, segment, col_set, data_key):
        self.requested_keys.append(data_key)
        segment_frame = self.frame.loc[slice(*self.segments[segment])][list(col_set)]
        return (
            segment_frame.dropna(subset=[("label", "LABEL0")])
            if data_key == "learn"
            else segment_frame
        )

    def fetch(self, dates, col_set, data_key):
        assert data_key == "raw"
        return self.frame.loc[dates, col_set] * 100


class Sampler:
    """The part of Qlib's TSDataSampler that qtorch uses: windows by a list of positions."""

    def __init__(self, frame: pd.DataFrame, start: str, end: str, step_len: int) -> None:
        sorted_frame = frame.swaplevel().sort_index()
        self.step_len, self.fillna_type = step_len, "none"
        empty = np.full((1, frame.shape[1]), np.nan)
        self.data_arr = np.concatenate([sorted_frame.to_numpy(np.float64), empty])
        number = pd.Series(range(len(sorted_frame)), index=sorted_frame.index, dtype=object)
        self.idx_df = number.unstack().sort_index().T.sort_index()
        date = sorted_frame.index.get_level_values(1)
        self.data_index = sorted_frame.index[(date >= start) & (date <= end)]

    def get_index(self):
        return self.data_index.swaplevel()

    def config(self, fillna_type):
        self.fillna_type = fillna_type

    def __len__(self):
        return len(self.data_index)

    def __getitem__(self, positions):
        out = []
        for k in positions:
            instrument, date = self.data_index[k]
            row = self.idx_df.index.get_loc(date)
            numbers = self.idx_df[instrument].iloc[max(0, row + 1 - self.step_len) : row + 1]
            numbers = numbers.reset_index(drop=True).astype(float)
            missing = self.step_len - len(numbers)
            numbers.index = numbers.index + missing
            numbers = numbers.reindex(range(self.step_len))
            if self.fillna_type != "none":
                numbers = numbers.ffill()
            if self.fillna_type == "ffill+bfill":
                numbers = numbers.bfill()
            rows = numbers.fillna(len(self.data_arr) - 1).astype(int)
            out.append(self.data_arr[rows.to_numpy()])
        return np.stack(out)


class Windows:
    """Windows that offer only an index, a length and item access."""

    def __init__(self, sampler: Sampler) -> None:
        self.get_index, self.config = sampler.get_index, sampler.config
        self._sampler = sampler

    def __len__(self):
        return len(self._sampler)

    def __getitem__(self, positions):
        return self._sampler[positions]


class WindowDataset(FrameDataset):
    def __init__(self, frame, step_len=6, wrap=lambda sampler: sampler):
        super().__init__(frame)
        self.step_len, self.wrap = step_len, wrap

    def prepare(self, segment, col_set, data_key):
        frame = self.frame[list(col_set)]
        if data_key == "learn":
            frame = frame.dropna(subset=[("label", "LABEL0")])
        return self.wrap(Sampler(frame, *self.segments[segment], self.step_len))


def test_samples_of_a_dataset_with_prepare(frame):
    dataset = FrameDataset(frame)
    samples = get_samples(dataset, "test", data_key="infer")
    expected_frame = frame.loc[SPAN]
    assert samples.index.equals(expected_frame.index)
    batch = samples.batch(torch.arange(len(samples)))
    np.testing.assert_array_equal(batch.x[:, 0], expected_frame["feature"].to_numpy())
    np.testing.assert_array_equal(batch.y, expected_frame["label"].to_numpy())
    np.testing.assert_allclose(batch.extra["raw_label"], expected_frame["label"].to_numpy() * 100)
    assert dataset.requested_keys == ["infer"]
    assert samples.feature_names == ("ROW", "HOLES")


def test_rows_without_a_label_are_left_out_for_learning(frame):
    frame.iloc[::9, 2] = np.nan
    dataset = FrameDataset(frame)
    assert not get_samples(dataset, "train", data_key="learn").target.isnan().any()
    infer = get_samples(dataset, "train", data_key="infer")
    assert len(infer) == len(frame.loc["2020-01-01":"2020-01-17"])


@pytest.mark.parametrize("fill", ["none", "ffill", "ffill+bfill"])
@pytest.mark.parametrize("kind", ["sampler", "access only"])
def test_samples_of_a_sampler_of_windows(frame, fill, kind):
    dataset = WindowDataset(frame, wrap=Windows if kind == "access only" else lambda s: s)
    samples = get_samples(dataset, "test", data_key="infer", fill=fill)
    sampler = Sampler(frame, SPAN.start, SPAN.stop, 6)
    sampler.config(fill)
    positions = sampler.get_index().get_indexer(samples.index)
    assert len(samples) == len(sampler)
    assert (positions >= 0).all()
    expected_windows = sampler[list(positions)].astype(np.float32)
    batch = samples.batch(torch.arange(len(samples)))
    np.testing.assert_array_equal(batch.x, expected_windows[:, :, :2])
    np.testing.assert_array_equal(batch.y[:, 0], expected_windows[:, -1, 2])
    raw = frame["label"].reindex(samples.index).to_numpy()
    np.testing.assert_allclose(batch.extra["raw_label"], raw * 100)
    assert (samples.num_steps, samples.num_features) == (6, 2)
    day = samples.day_batch(torch.tensor([2]))
    assert day.mask.all()
    assert (day.date == day.date[0, 0]).all()


class UserDataset:
    """The minimal dataset: only `prepare`, without any dates."""

    def __init__(self, frame: pd.DataFrame, **spans: slice) -> None:
        self.frame, self.spans = frame, spans

    def prepare(self, segment, col_set, data_key):
        return self.frame.loc[self.spans[segment]][list(col_set)]


def make_user_dataset(frame: pd.DataFrame, train_end: str = "2020-01-24") -> UserDataset:
    valid, test = slice("2020-01-27", "2020-02-07"), slice("2020-02-10", "2020-03-03")
    return UserDataset(
        frame.fillna(0.0), train=slice("2020-01-01", train_end), valid=valid, test=test
    )


def small_model() -> LightningModel:
    return LightningModel(
        {"_target_": "qtorch.nn.MLP", "layers": [4]},
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        checkpoint={"enabled": False},
        seed=0,
    )


def test_a_model_fits_and_predicts_a_user_defined_dataset(frame, caplog):
    dataset, model = make_user_dataset(frame), small_model()
    model.fit(dataset)
    assert (
        "train: no samples are purged, cannot tell how far the label of UserDataset looks"
        in caplog.text
    )
    assert "attribute `horizon`" in caplog.text
    scores = model.predict(dataset)
    assert scores.index.equals(frame.loc[dataset.spans["test"]].index)
    assert np.isfinite(scores).all()
    caplog.clear()
    dataset.horizon = 2
    caplog.set_level("INFO")
    model.fit(dataset)
    assert "no samples are purged" not in caplog.text
    train_frame = frame.loc[dataset.spans["train"]]
    num_purged = len(train_frame.loc["2020-01-23":])
    assert f"train: purged {num_purged} samples whose" in caplog.text
    with pytest.raises(ConfigError, match=r"'train' and 'valid' overlap.*1 days in both"):
        model.fit(make_user_dataset(frame, train_end="2020-01-27"))


@pytest.mark.parametrize("kind", [FrameDataset, WindowDataset])
def test_purging_by_a_given_horizon_or_the_label_expression(frame, kind):
    def days(dataset, **options):
        samples = get_samples(dataset, "train", data_key="learn", **options)
        return samples.index.get_level_values(0).unique()

    frame.iloc[:, 2] = 1.0
    dataset = kind(frame)
    all_days = days(dataset)
    assert all_days[-1] == pd.Timestamp("2020-01-17")
    assert days(dataset, horizon=3).equals(all_days[:-3])
    with pytest.raises(
        ConfigError, match=f"purge=True: cannot tell how far the label of {kind.__name__}"
    ):
        days(dataset, purge=True)
    label = (["Ref($close, -2) / Ref($close, -1) - 1"], ["LABEL0"])
    dataset.handler.data_loader = SimpleNamespace(fields={"label": label})
    assert days(dataset).equals(all_days[:-2])
    assert days(dataset, purge=False).equals(all_days)
    assert len(get_samples(dataset, "train")) == len(frame.loc[all_days[0] : all_days[-1]])
    dataset.segments["test"] = ("2020-01-17", "2020-02-28")
    with pytest.raises(ConfigError, match=r"segments 'train' .* and 'test' .* overlap"):
        days(dataset)
    dataset.allow_overlap = True
    assert days(dataset).equals(all_days)  # no segment begins after it
    with pytest.raises(ConfigError, match="a plain frame has no segments"):
        get_samples(frame, slice(None), horizon=2)


def test_windows_without_a_label_are_left_out_for_learning(frame):
    def remove_labels(sampler: Sampler) -> Sampler:
        sampler.data_arr[::9, 2] = np.nan
        return sampler

    samples = get_samples(WindowDataset(frame, wrap=remove_labels), "test", data_key="learn")
    assert not samples.target.isnan().any()
    assert 0 < len(samples) < len(frame.loc[SPAN])


def test_samples_of_a_plain_frame(frame):
    samples = get_samples(frame, SPAN, step_len=4, fill="none")
    assert len(samples) == len(frame.loc[SPAN])
    assert samples.raw_label is None
    x = samples.batch(torch.tensor([0])).x
    assert x.shape == (1, 4, 2)
    assert len(get_samples(frame, None)) == len(frame)
    shuffled_frame = frame.sample(frac=1.0, random_state=0)
    np.testing.assert_array_equal(
        get_samples(shuffled_frame, None).target, get_samples(frame, None).target
    )


def test_errors_for_objects_that_are_not_datasets(frame):
    with pytest.raises(DataError, match="dict is not a dataset: it has neither samples"):
        get_samples({}, "train")
    with pytest.raises(DataError, match="a plain frame has no segment 'train'"):
        get_samples(frame, "train")
    with pytest.raises(DataError, match=r"columns \(group, name\)"):
        get_samples(frame["feature"], None)
    with pytest.raises(DataError, match="unknown group of columns 'feature'"):
        get_samples(frame[["label"]], None)
    odd = SimpleNamespace(prepare=lambda *args, **kwargs: 3)
    with pytest.raises(DataError, match="prepare returned a int"):
        get_samples(odd, "train")
    empty = SimpleNamespace(prepare=lambda *args, **kwargs: frame.iloc[:0])
    with pytest.raises(DataError, match="train has no samples: the frame is empty"):
        get_samples(empty, "train")
    with pytest.raises(DataError, match="no feature column is left"):
        as_samples(WindowDataset(frame), "test", num_labels=3)


def test_infinite_features_are_named(frame):
    frame.iloc[3, 1] = np.inf
    with pytest.raises(DataError, match="infinite values in the features: HOLES"):
        get_samples(FrameDataset(frame), "train").to("cpu")
    with pytest.raises(DataError, match="infinite values in the features: column 1"):
        get_samples(WindowDataset(frame), "train")


@pytest.mark.slow
@pytest.mark.qlib
def test_samples_equal_real_qlibs_datasets(frame, tmp_path, qlib_python):
    frame.iloc[::17, 2] = np.nan
    frame.columns = pd.Index(["/".join(c) for c in frame.columns])
    frame.to_parquet(tmp_path / "frame.parquet")
    command = [
        qlib_python,
        str(ROOT / "scripts" / "parity" / "qlib_samples.py"),
        str(tmp_path / "frame.parquet"),
        "6",
        "train=2020-01-01,2020-01-31",
        "test=2020-02-03,2020-03-03",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert len([line for line in process.stdout.splitlines() if "equal" in line]) == 8
