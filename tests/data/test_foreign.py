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
from qtorch.data.foreign import as_samples
from qtorch.data.samples import samples_of
from qtorch.model import LightningModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "parity"))

import windows as parity  # noqa: E402

SPAN = slice("2020-01-20", "2020-02-28")


@pytest.fixture
def frame() -> pd.DataFrame:
    return parity.stress_frame(num_dates=45, num_instruments=5)


class FrameDataset:
    """What DatasetH shows of itself: segments, a handler, prepare."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.segments = {"train": ("2020-01-01", "2020-01-17"), "test": (SPAN.start, SPAN.stop)}
        self.handler = SimpleNamespace(fetch=self.fetch, get_cols=lambda col_set: ["LABEL0"])
        self.asked: list[str] = []

    def prepare(self, segment, col_set, data_key):
        self.asked.append(data_key)
        found = self.frame.loc[slice(*self.segments[segment])][list(col_set)]
        return found.dropna(subset=[("label", "LABEL0")]) if data_key == "learn" else found

    def fetch(self, dates, col_set, data_key):
        assert data_key == "raw"
        return self.frame.loc[dates, col_set] * 100


class Sampler:
    """What Qlib's TSDataSampler shows of itself; windows by a list of positions."""

    def __init__(self, frame: pd.DataFrame, start: str, end: str, step_len: int) -> None:
        ordered = frame.swaplevel().sort_index()
        self.step_len, self.fillna_type = step_len, "none"
        empty = np.full((1, frame.shape[1]), np.nan)
        self.data_arr = np.concatenate([ordered.to_numpy(np.float64), empty])
        number = pd.Series(range(len(ordered)), index=ordered.index, dtype=object)
        self.idx_df = number.unstack().sort_index().T.sort_index()
        date = ordered.index.get_level_values(1)
        self.data_index = ordered.index[(date >= start) & (date <= end)]

    def get_index(self):
        return self.data_index.swaplevel()

    def config(self, fillna_type):
        self.fillna_type = fillna_type

    def __len__(self):
        return len(self.data_index)

    def __getitem__(self, positions):
        out = []
        for k in positions:
            who, date = self.data_index[k]
            place = self.idx_df.index.get_loc(date)
            numbers = self.idx_df[who].iloc[max(0, place + 1 - self.step_len) : place + 1]
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
    """Windows of which nothing is known but index, length and access."""

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


def test_a_dataset_with_prepare(frame):
    dataset = FrameDataset(frame)
    samples = samples_of(dataset, "test", data_key="infer")
    expected = frame.loc[SPAN]
    assert samples.index.equals(expected.index)
    batch = samples.batch(torch.arange(len(samples)))
    np.testing.assert_array_equal(batch.x[:, 0], expected["feature"].to_numpy())
    np.testing.assert_array_equal(batch.y, expected["label"].to_numpy())
    np.testing.assert_allclose(batch.extra["raw_label"], expected["label"].to_numpy() * 100)
    assert dataset.asked == ["infer"]
    assert samples.feature_names == ("ROW", "HOLES")


def test_learning_leaves_out_rows_without_label(frame):
    frame.iloc[::9, 2] = np.nan
    dataset = FrameDataset(frame)
    assert not samples_of(dataset, "train", data_key="learn").target.isnan().any()
    infer = samples_of(dataset, "train", data_key="infer")
    assert len(infer) == len(frame.loc["2020-01-01":"2020-01-17"])


@pytest.mark.parametrize("fill", ["none", "ffill", "ffill+bfill"])
@pytest.mark.parametrize("kind", ["sampler", "access only"])
def test_windows_of_a_sampler(frame, fill, kind):
    dataset = WindowDataset(frame, wrap=Windows if kind == "access only" else lambda s: s)
    samples = samples_of(dataset, "test", data_key="infer", fill=fill)
    theirs = Sampler(frame, SPAN.start, SPAN.stop, 6)
    theirs.config(fill)
    at = theirs.get_index().get_indexer(samples.index)
    assert len(samples) == len(theirs)
    assert (at >= 0).all()
    expected = theirs[list(at)].astype(np.float32)
    batch = samples.batch(torch.arange(len(samples)))
    np.testing.assert_array_equal(batch.x, expected[:, :, :2])
    np.testing.assert_array_equal(batch.y[:, 0], expected[:, -1, 2])
    raw = frame["label"].reindex(samples.index).to_numpy()
    np.testing.assert_allclose(batch.extra["raw_label"], raw * 100)
    assert (samples.num_steps, samples.num_features) == (6, 2)
    day = samples.day_batch(torch.tensor([2]))
    assert day.mask.all()
    assert (day.date == day.date[0, 0]).all()


class OwnDataset:
    """The least that is a dataset: `prepare`, and not a word of its dates."""

    def __init__(self, frame: pd.DataFrame, **spans: slice) -> None:
        self.frame, self.spans = frame, spans

    def prepare(self, segment, col_set, data_key):
        return self.frame.loc[self.spans[segment]][list(col_set)]


def own_dataset(frame: pd.DataFrame, train_end: str = "2020-01-24") -> OwnDataset:
    valid, test = slice("2020-01-27", "2020-02-07"), slice("2020-02-10", "2020-03-03")
    return OwnDataset(
        frame.fillna(0.0), train=slice("2020-01-01", train_end), valid=valid, test=test
    )


def small_model() -> LightningModel:
    return LightningModel(
        {"_target_": "qtorch.nn.MLP", "layers": [4]},
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        checkpoint={"enabled": False},
        seed=0,
    )


def test_a_dataset_of_ones_own_is_learnt_from_and_predicted(frame, caplog):
    dataset, model = own_dataset(frame), small_model()
    model.fit(dataset)
    assert "train: nothing is purged, how far the label of OwnDataset looks ahead" in caplog.text
    assert "attribute `horizon`" in caplog.text
    scores = model.predict(dataset)
    assert scores.index.equals(frame.loc[dataset.spans["test"]].index)
    assert np.isfinite(scores).all()
    caplog.clear()
    dataset.horizon = 2
    caplog.set_level("INFO")
    model.fit(dataset)
    assert "nothing is purged" not in caplog.text
    whole = frame.loc[dataset.spans["train"]]
    gone = len(whole.loc["2020-01-23":])
    assert f"train: {gone} samples purged" in caplog.text
    with pytest.raises(ConfigError, match=r"'train' and 'valid' overlap.*1 days in both"):
        model.fit(own_dataset(frame, train_end="2020-01-27"))


@pytest.mark.parametrize("kind", [FrameDataset, WindowDataset])
def test_purging_by_days_that_are_given_or_read_from_the_label(frame, kind):
    def days(dataset, **options):
        samples = samples_of(dataset, "train", data_key="learn", **options)
        return samples.index.get_level_values(0).unique()

    frame.iloc[:, 2] = 1.0
    dataset = kind(frame)
    whole = days(dataset)
    assert whole[-1] == pd.Timestamp("2020-01-17")
    assert days(dataset, horizon=3).equals(whole[:-3])
    with pytest.raises(ConfigError, match=f"purge=True: how far the label of {kind.__name__}"):
        days(dataset, purge=True)
    label = (["Ref($close, -2) / Ref($close, -1) - 1"], ["LABEL0"])
    dataset.handler.data_loader = SimpleNamespace(fields={"label": label})
    assert days(dataset).equals(whole[:-2])
    assert days(dataset, purge=False).equals(whole)
    assert len(samples_of(dataset, "train")) == len(frame.loc[whole[0] : whole[-1]])
    dataset.segments["test"] = ("2020-01-17", "2020-02-28")
    with pytest.raises(ConfigError, match=r"segments 'train' .* and 'test' .* overlap"):
        days(dataset)
    dataset.allow_overlap = True
    assert days(dataset).equals(whole)  # nothing begins behind it
    with pytest.raises(ConfigError, match="a plain frame has no segments"):
        samples_of(frame, slice(None), horizon=2)


def test_windows_without_label_are_left_out_for_learning(frame):
    def blank(sampler: Sampler) -> Sampler:
        sampler.data_arr[::9, 2] = np.nan
        return sampler

    samples = samples_of(WindowDataset(frame, wrap=blank), "test", data_key="learn")
    assert not samples.target.isnan().any()
    assert 0 < len(samples) < len(frame.loc[SPAN])


def test_a_plain_frame(frame):
    samples = samples_of(frame, SPAN, step_len=4, fill="none")
    assert len(samples) == len(frame.loc[SPAN])
    assert samples.raw_label is None
    x = samples.batch(torch.tensor([0])).x
    assert x.shape == (1, 4, 2)
    assert len(samples_of(frame, None)) == len(frame)
    shuffled = frame.sample(frac=1.0, random_state=0)
    np.testing.assert_array_equal(samples_of(shuffled, None).target, samples_of(frame, None).target)


def test_what_is_no_dataset_says_what_is_wanted(frame):
    with pytest.raises(DataError, match="dict is no dataset: it has neither samples"):
        samples_of({}, "train")
    with pytest.raises(DataError, match="a plain frame has no segment 'train'"):
        samples_of(frame, "train")
    with pytest.raises(DataError, match=r"columns \(group, name\)"):
        samples_of(frame["feature"], None)
    with pytest.raises(DataError, match="unknown group of columns 'feature'"):
        samples_of(frame[["label"]], None)
    odd = SimpleNamespace(prepare=lambda *args, **kwargs: 3)
    with pytest.raises(DataError, match="prepare gave a int"):
        samples_of(odd, "train")
    empty = SimpleNamespace(prepare=lambda *args, **kwargs: frame.iloc[:0])
    with pytest.raises(DataError, match="train holds no sample: the frame is empty"):
        samples_of(empty, "train")
    with pytest.raises(DataError, match="no feature is left"):
        as_samples(WindowDataset(frame), "test", num_labels=3)


def test_infinite_features_are_named(frame):
    frame.iloc[3, 1] = np.inf
    with pytest.raises(DataError, match="infinite values in the features: HOLES"):
        samples_of(FrameDataset(frame), "train").to("cpu")
    with pytest.raises(DataError, match="infinite values in the features: column 1"):
        samples_of(WindowDataset(frame), "train")


@pytest.mark.slow
@pytest.mark.qlib
def test_real_qlibs_datasets(frame, tmp_path, qlib_python):
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
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([line for line in done.stdout.splitlines() if "equal" in line]) == 8
