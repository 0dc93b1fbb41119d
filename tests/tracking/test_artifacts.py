"""Objects come back as they were, without pickle where a safe format exists."""

from __future__ import annotations

import datetime
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stored_things import Counter, Plan

from qtorch.core.errors import LoadObjectError, TrackingError, TrustError
from qtorch.core.session import session_context
from qtorch.tracking.artifacts import logical_name, object_files, read_object, write_object


def there_and_back(value, folder: Path, name: str = "thing.pkl"):
    path = write_object(value, folder, name)
    return read_object(path, name), path


def prediction(dtype="float32") -> pd.Series:
    dates = pd.date_range("2020-01-01", periods=4, unit="ns")
    index = pd.MultiIndex.from_product([dates, ["B", "A", "C"]], names=["datetime", "instrument"])
    values = np.arange(12, dtype=dtype)
    values[3] = np.nan
    return pd.Series(values, index=index, name="score")


FRAMES = {
    "series": prediction(),
    "frame": prediction("float64").to_frame(),
    "part of a product": prediction().iloc[5:9],
    "unnamed": prediction().rename(None).to_frame("x"),
    "columns of two levels": pd.DataFrame(
        [[1.0, 2.0], [3.0, 4.0]],
        index=pd.date_range("2020-01-01", periods=2, unit="s", name="datetime"),
        columns=pd.MultiIndex.from_tuples([("feature", "A"), ("label", "A")], names=["g", None]),
    ),
    "range": pd.DataFrame({"a": [1, 2], "b": [True, False]}),
    "stepped range": pd.DataFrame({"a": [1, 2, 3]}).iloc[::2],
    "number labels": pd.DataFrame(np.eye(3, dtype=np.float16)),
    "kinds": pd.DataFrame(
        {
            "i": np.array([1, 2, 3], dtype=np.int8),
            "I": pd.array([1, None, 3], dtype="Int64"),
            "s": ["a", None, "c"],
            "o": np.array(["a", None, "c"], dtype=object),
            "mixed": [[1, 2], {"a": (1, np.inf)}, None],
            "t": pd.to_datetime(["2020-01-01", None, "2020-01-03"]).tz_localize("Asia/Shanghai"),
            "d": pd.to_timedelta([1, 2, 3], unit="D"),
            "c": pd.Categorical(["x", "y", "x"], categories=["z", "y", "x"], ordered=True),
            ("odd", 1): [1.0, np.inf, -np.inf],
        },
        index=["p", "q", "r"],
    ),
    "business days": pd.Series([1.0, 2.0], index=pd.date_range("2020-01-02", periods=2, freq="B")),
    "empty": pd.DataFrame(
        {"a": np.array([], np.float32)}, index=prediction().index[:0].remove_unused_levels()
    ),
    "no columns": pd.DataFrame(index=prediction().index),
    "one row": prediction().iloc[:1],
    "missing instrument": pd.Series(
        [1.0, 2.0], index=pd.MultiIndex.from_tuples([("a", 1.0), (None, 2.0)], names=["k", "v"])
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_comes_back_equal(name, tmp_path):
    frame = FRAMES[name]
    back, path = there_and_back(frame, tmp_path)
    assert path.name == "thing.pkl.parquet"
    freq = not isinstance(frame.index, pd.MultiIndex)  # a level's is an accident of its making
    if isinstance(frame, pd.Series):
        pd.testing.assert_series_equal(back, frame, check_freq=freq)
    else:
        pd.testing.assert_frame_equal(back, frame, check_freq=freq)
    assert type(back.index) is type(frame.index)


def test_a_prediction_can_be_sliced_by_date(tmp_path):
    back, _ = there_and_back(prediction(), tmp_path)
    assert len(back.loc["2020-01-02":"2020-01-03"]) == 6  # needs sorted levels


def test_a_prediction_is_readable_by_any_parquet_reader(tmp_path):
    _, path = there_and_back(prediction(), tmp_path)
    assert list(pd.read_parquet(path).columns) == ["datetime", "instrument", "score"]


PLAIN = [
    {"model": {"lr": 1e-3, "layers": (1, 2), "none": None}, 3: "three", "nan": float("inf")},
    [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 5), pd.Timestamp("2020-01-01")],
    pd.Timestamp("2020-01-01", tz="Europe/Paris"),
    {"$tuple": "a key that is a mark"},
    {"a", "b"},
    "text with ünicode",
    {},
]


@pytest.mark.parametrize(
    "value", PLAIN, ids=lambda value: f"{type(value).__name__} of {len(repr(value))}"
)
def test_plain_data_is_json(value, tmp_path):
    back, path = there_and_back(value, tmp_path, "task")
    assert back == value
    assert type(back) is type(value)
    assert path.name == "task.object.json"
    json.loads(path.read_text())


def test_arrays_and_tensors_are_safetensors(tmp_path):
    values = {"w": torch.arange(6).reshape(2, 3).T, "a": np.eye(2), "s": np.float32([[1.5]])[0, 0:]}
    back, path = there_and_back(values, tmp_path)
    assert path.suffix == ".safetensors"
    assert torch.equal(back["w"], values["w"])
    np.testing.assert_array_equal(back["a"], values["a"])
    assert isinstance(back["a"], np.ndarray)
    scalar, _ = there_and_back(np.array(3.0), tmp_path)
    assert scalar.shape == ()
    assert scalar == 3.0
    names, path = there_and_back(np.array(["a", "b"]), tmp_path)
    assert list(names) == ["a", "b"]


def test_a_container_of_frames_needs_no_pickle(tmp_path):
    value = {"1day": (prediction(), {"cash": 1.0}), 5: [prediction().to_frame()]}
    back, path = there_and_back(value, tmp_path)
    assert path.suffix == ".zip"
    pd.testing.assert_series_equal(back["1day"][0], value["1day"][0])
    pd.testing.assert_frame_equal(back[5][0], value[5][0])
    assert back["1day"][1] == {"cash": 1.0}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_a_state_is_stored_without_pickle_and_its_class_needs_trust(weights, tmp_path):
    path = write_object(Plan(("a", 1), weights), tmp_path, "params.pkl")
    assert path.suffix == (".json" if weights is None else ".safetensors")
    with pytest.raises(TrustError, match=r"trusted=\['stored_things'\]"):
        read_object(path, "params.pkl")
    with session_context(trusted=("stored_things",)):
        back = read_object(path, "params.pkl")
    assert isinstance(back, Plan)
    assert back.steps == ("a", 1)
    assert weights is None or back.weights.tolist() == weights


def test_anything_else_is_a_pickle_and_needs_trust(tmp_path):
    path = write_object(Counter(3), tmp_path, "counter")
    assert path.name == "counter.object.pickle"
    with pytest.raises(TrustError, match="stored_things"):
        read_object(path, "counter")
    with session_context(trusted=("stored_things",)):
        assert read_object(path, "counter").count == 3


def test_a_bare_pickle_is_read_by_the_same_rule(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert read_object(tmp_path / "x.pkl", "x.pkl") == {"a": 1}
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(Counter(1)))
    with pytest.raises(TrustError):
        read_object(tmp_path / "y.pkl", "y.pkl")


def test_what_cannot_be_stored_says_so(tmp_path):
    with pytest.raises(TrackingError, match="to_state and from_state"):
        write_object(lambda: 0, tmp_path, "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [prediction(), {"a": 1}, np.eye(2), [prediction()], Counter(1)])
def test_a_newer_format_is_refused_by_name(value, tmp_path, monkeypatch):
    monkeypatch.setattr("qtorch.tracking.artifacts.FORMAT", 2)
    path = write_object(value, tmp_path, "thing.pkl")
    monkeypatch.undo()
    with pytest.raises(LoadObjectError, match=r"'thing\.pkl' was stored in format 2"):
        read_object(path, "thing.pkl")


@pytest.mark.parametrize("value", [prediction(), {"a": 1}, np.eye(2), [prediction()], Counter(1)])
def test_a_cut_file_is_an_error(value, tmp_path):
    path = write_object(value, tmp_path, "thing.pkl")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoadObjectError, match="thing"), session_context(trusted=("stored_things",)):
        read_object(path, "thing.pkl")


def test_a_full_disk_is_one_clear_error_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtorch.tracking.artifacts._write_json", full)
    with pytest.raises(TrackingError, match=r"'task' could not be written .*No space left"):
        write_object({"a": 1}, tmp_path, "task")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pred.pkl", "task", "sig/ic.pkl", "a.b", "ü x"])
def test_a_logical_name_is_read_off_the_file(name):
    assert {logical_name(file) for file in object_files(name)} == {name}


def test_files_of_the_user_are_no_objects():
    for file in ("report.json", "x.parquet", "x.pkl", "a.txt"):
        assert logical_name(file) is None
