from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.data import DataHandlerLP, TSDatasetH
from qtorch.data.dataset.sampler import TSDataSampler

DATES = pd.bdate_range("2020-01-01", periods=20)
NAN = np.nan


@pytest.fixture
def dataset() -> TSDatasetH:
    """Instrument A has every day, B lacks days 6 and 8; x counts days, the label is minus x."""
    index = pd.MultiIndex.from_product([DATES, ["B", "A"]], names=["datetime", "instrument"])
    day = index.get_level_values(0).map({d: k for k, d in enumerate(DATES)}).to_numpy(float)
    offset = (index.get_level_values(1) == "B") * 100.0
    columns = pd.MultiIndex.from_tuples([("feature", "x"), ("label", "LABEL0")])
    frame = pd.DataFrame(np.stack([day + offset, -day], 1), index, columns)
    frame = frame.drop([(DATES[6], "B"), (DATES[8], "B")])
    frame.loc[(DATES[9], "A"), ("label", "LABEL0")] = NAN
    handler = DataHandlerLP.from_df(frame, learn_processors=["DropnaLabel"])
    segments = {"train": (DATES[0], DATES[7]), "test": (DATES[8], DATES[12])}
    return TSDatasetH(handler, segments, step_len=4)


def test_order_length_and_access(dataset: TSDatasetH) -> None:
    sampler = dataset.prepare("test", col_set=["feature", "label"])
    assert isinstance(sampler, TSDataSampler)
    expected_index = [(d, "A") for d in DATES[8:13]] + [(d, "B") for d in DATES[9:13]]
    assert list(sampler.get_index()) == expected_index
    assert list(sampler.data_index) == [(n, d) for d, n in expected_index]
    assert len(sampler) == 9
    assert not sampler.empty
    assert (sampler.start, sampler.end) == (DATES[8], DATES[12])
    np.testing.assert_array_equal(sampler[0], [[5, -5], [6, -6], [7, -7], [8, -8]])
    np.testing.assert_array_equal(sampler[DATES[8], "A"], sampler[0])
    np.testing.assert_array_equal(sampler["2020-01-18", "A"], sampler[DATES[12], "A"])
    assert sampler[[0, 8]].shape == (2, 4, 2)
    np.testing.assert_array_equal(sampler[np.array([0])][0], sampler[0])
    np.testing.assert_array_equal(sampler[[(DATES[9], "B"), 1]][1], sampler[1])
    assert sum(1 for _ in sampler) == 9


@pytest.mark.parametrize(
    ("fill", "expected_window"),
    [
        ("none", [NAN, 107, NAN, 109]),
        ("ffill", [NAN, 107, 107, 109]),
        ("ffill+bfill", [107, 107, 107, 109]),
    ],
)
def test_days_without_a_row(dataset: TSDatasetH, fill: str, expected_window: list[float]) -> None:
    sampler = dataset.prepare("test", col_set="feature")
    assert sampler.fillna_type == "none"
    sampler.config(fillna_type=fill)
    np.testing.assert_array_equal(sampler[DATES[9], "B"][:, 0], expected_window)


def test_windows_before_the_data_are_missing(dataset: TSDatasetH) -> None:
    sampler = dataset.prepare("train", col_set="feature")
    np.testing.assert_array_equal(sampler[DATES[1], "A"][:, 0], [NAN, NAN, 0, 1])


def test_windows_include_rows_dropped_for_their_label(dataset: TSDatasetH) -> None:
    """Check the declared difference: Qlib's window of day 10 is [7, 8, NaN, 10]."""
    sampler = dataset.prepare("test", col_set="feature", data_key="learn")
    assert (DATES[9], "A") not in sampler.get_index()
    np.testing.assert_array_equal(sampler[DATES[10], "A"][:, 0], [7, 8, 9, 10])


def test_lists_of_segments_and_types(dataset: TSDatasetH) -> None:
    train, test = dataset.prepare(["train", "test"], dtype=np.float64)
    assert (len(train), len(test)) == (15, 9)
    assert test[0].dtype == np.float64
    assert len(dataset.prepare(slice(DATES[10], DATES[11]))) == 4


def test_invalid_indices_are_refused(dataset: TSDatasetH) -> None:
    sampler = dataset.prepare("test")
    with pytest.raises(IndexError, match=r"9 is out of \[0, 9\)"):
        sampler[9]
    with pytest.raises(DataError, match="unknown instrument 'Z'"):
        sampler[DATES[9], "Z"]
    with pytest.raises(DataError, match="data begins later"):
        sampler["2019-01-01", "A"]
    with pytest.raises(ConfigError, match="expected a position"):
        sampler["A"]
    with pytest.raises(ConfigError, match="Did you mean 'ffill'"):
        sampler.config(fillna_type="fill")
