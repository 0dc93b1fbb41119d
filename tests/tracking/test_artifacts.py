"""Objects are restored exactly, without pickle if there is a safe format."""

from __future__ import annotations

import datetime
import json
import pickle
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from stored_things import Counter, Plan

from qtorch.core.errors import LoadObjectError, TrackingError, TrustError
from qtorch.core.session import session_context
from qtorch.core.trust import StoredText
from qtorch.tracking.artifacts import (
    RunFiles,
    logical_name,
    object_files,
    read_object,
    write_object,
)
from qtorch.tracking.delivery import Sender


def round_trip(value, folder: Path, name: str = "thing.pkl"):
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
def test_frame_is_restored_exactly(name, tmp_path):
    frame = FRAMES[name]
    result, path = round_trip(frame, tmp_path)
    assert path.name == "thing.pkl.parquet"
    freq = not isinstance(frame.index, pd.MultiIndex)  # a level's freq is arbitrary
    if isinstance(frame, pd.Series):
        pd.testing.assert_series_equal(result, frame, check_freq=freq)
    else:
        pd.testing.assert_frame_equal(result, frame, check_freq=freq)
    assert type(result.index) is type(frame.index)


def test_prediction_can_be_sliced_by_date(tmp_path):
    result, _ = round_trip(prediction(), tmp_path)
    assert len(result.loc["2020-01-02":"2020-01-03"]) == 6  # needs sorted levels


def test_prediction_is_readable_by_any_parquet_reader(tmp_path):
    _, path = round_trip(prediction(), tmp_path)
    assert list(pd.read_parquet(path).columns) == ["datetime", "instrument", "score"]


PLAIN = [
    {"model": {"lr": 1e-3, "layers": (1, 2), "none": None}, 3: "three", "nan": float("inf")},
    [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 5), pd.Timestamp("2020-01-01")],
    pd.Timestamp("2020-01-01", tz="Europe/Paris"),
    {"$tuple": "a key that is also a tag"},
    {"a", "b"},
    "text with ünicode",
    {},
]


@pytest.mark.parametrize(
    "value", PLAIN, ids=lambda value: f"{type(value).__name__} of {len(repr(value))}"
)
def test_plain_data_is_stored_as_json(value, tmp_path):
    result, path = round_trip(value, tmp_path, "task")
    assert result == value
    assert type(result) is (StoredText if isinstance(value, str) else type(value))
    assert path.name == "task.object.json"
    json.loads(path.read_text())


def test_configurations_of_hydra_are_stored_as_plain_data(tmp_path):
    config = OmegaConf.create({"lr": 0.1, "same": "${lr}", "layers": [8, 4]})
    for value in (config, {"all": [config]}):
        result, path = round_trip(value, tmp_path, "config")
        plain = {"lr": 0.1, "same": 0.1, "layers": [8, 4]}
        assert result == (plain if value is config else {"all": [plain]})
        assert path.name == "config.object.json"
    unresolved = OmegaConf.create({"a": "${missing}"})
    assert write_object(unresolved, tmp_path, "config").suffix == ".pickle"


def test_arrays_and_tensors_are_stored_as_safetensors(tmp_path):
    values = {"w": torch.arange(6).reshape(2, 3).T, "a": np.eye(2), "s": np.float32([[1.5]])[0, 0:]}
    result, path = round_trip(values, tmp_path)
    assert path.suffix == ".safetensors"
    assert torch.equal(result["w"], values["w"])
    np.testing.assert_array_equal(result["a"], values["a"])
    assert isinstance(result["a"], np.ndarray)
    scalar, _ = round_trip(np.array(3.0), tmp_path)
    assert scalar.shape == ()
    assert scalar == 3.0
    with session_context(trusted_pickle=True):
        names, path = round_trip(np.array(["a", "b"]), tmp_path)
    assert list(names) == ["a", "b"]


def test_container_of_frames_needs_no_pickle(tmp_path):
    value = {"1day": (prediction(), {"cash": 1.0}), 5: [prediction().to_frame()]}
    result, path = round_trip(value, tmp_path)
    assert path.suffix == ".zip"
    pd.testing.assert_series_equal(result["1day"][0], value["1day"][0])
    pd.testing.assert_frame_equal(result[5][0], value[5][0])
    assert result["1day"][1] == {"cash": 1.0}


def test_subclass_of_a_container_keeps_its_type(tmp_path):
    with session_context(trusted_pickle=True):
        result, _ = round_trip([OrderedDict(b=1, a=2)], tmp_path)
    assert type(result[0]) is OrderedDict
    assert result == [OrderedDict(b=1, a=2)]
    path = write_object([OrderedDict(scores=prediction())], tmp_path, "scores")
    assert path.name == "scores.object.pickle"


class UnreachableStore:
    """A store of which every request fails."""

    uri = "http://nowhere"

    def upload(self, *_):
        raise TrackingError("the tracking server does not answer.")

    artifacts = download = remove = upload


def test_folder_in_the_outbox_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("qtorch.tracking.artifacts.PAUSES", ())
    sender = Sender(UnreachableStore(), "run", 1)
    run_files = RunFiles(UnreachableStore, "run", "s3://bucket/run", lambda: nullcontext(sender))
    local = tmp_path / "scratch"
    write_object({"a": 1}, local, "numbers")
    (local / "page.html").write_text("page")
    run_files.save_path(local, "report", content=True)
    assert run_files.load("report/numbers") == {"a": 1}
    assert Path(run_files.fetch("report/page.html", None)).read_text() == "page"
    copy = run_files.fetch("report/page.html", str(tmp_path / "target"))
    assert copy == str(tmp_path / "target" / "report" / "page.html")
    assert Path(copy).read_text() == "page"


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_state_needs_no_pickle_but_a_trusted_class(weights, tmp_path):
    path = write_object(Plan(("a", 1), weights), tmp_path, "params.pkl")
    assert path.suffix == (".json" if weights is None else ".safetensors")
    with pytest.raises(TrustError, match=r"trusted=\['stored_things'\]"):
        read_object(path, "params.pkl")
    with session_context(trusted=("stored_things",)):
        result = read_object(path, "params.pkl")
    assert isinstance(result, Plan)
    assert result.steps == ("a", 1)
    assert weights is None or result.weights.tolist() == weights


def test_configuration_of_an_object_is_stored_without_passwords(tmp_path, monkeypatch):
    url = "postgresql://me:s3cret@of-artifacts/db"
    monkeypatch.setenv("DATABASE_OF_THIS_MACHINE", url)
    path = write_object(Plan((url,)), tmp_path, "plan")
    assert b"s3cret" not in path.read_bytes()
    with session_context(trusted=("stored_things",)):
        assert read_object(path, "plan").steps == (url,)  # completed


def test_other_objects_are_pickled_and_need_trust(tmp_path):
    path = write_object(Counter(3), tmp_path, "counter")
    assert path.name == "counter.object.pickle"
    with session_context(trusted=("stored_things",)), pytest.raises(TrustError, match="'counter'"):
        read_object(path, "counter")
    with session_context(trusted_pickle=True):
        assert read_object(path, "counter").count == 3


def test_plain_pickle_file_needs_trust_too(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(TrustError, match=r"x\.pkl.*trusted_pickle"):
        read_object(tmp_path / "x.pkl", "x.pkl")
    with session_context(trusted_pickle=True):
        assert read_object(tmp_path / "x.pkl", "x.pkl") == {"a": 1}


def test_unpicklable_object_raises(tmp_path):
    with pytest.raises(TrackingError, match="to_state and from_state"):
        write_object(lambda: 0, tmp_path, "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [prediction(), {"a": 1}, np.eye(2), [prediction()], Counter(1)])
def test_newer_format_raises_with_the_name(value, tmp_path, monkeypatch):
    monkeypatch.setattr("qtorch.tracking.artifacts.FORMAT", 3)
    path = write_object(value, tmp_path, "thing.pkl")
    monkeypatch.undo()
    with pytest.raises(LoadObjectError, match=r"'thing\.pkl' was stored in format 3"):
        read_object(path, "thing.pkl")


@pytest.mark.parametrize("value", [prediction(), {"a": 1}, np.eye(2), [prediction()], Counter(1)])
def test_truncated_file_raises(value, tmp_path):
    path = write_object(value, tmp_path, "thing.pkl")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoadObjectError, match="thing"), session_context(trusted_pickle=True):
        read_object(path, "thing.pkl")


def test_full_disk_raises_and_leaves_no_file(tmp_path, monkeypatch):
    def raise_disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtorch.tracking.artifacts._write_json", raise_disk_full)
    with pytest.raises(TrackingError, match=r"'task' could not be written .*No space left"):
        write_object({"a": 1}, tmp_path, "task")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pred.pkl", "task", "sig/ic.pkl", "a.b", "ü x"])
def test_logical_name_is_derived_from_the_file_name(name):
    assert {logical_name(file) for file in object_files(name)} == {name}


def test_user_files_are_not_objects():
    for file in ("report.json", "x.parquet", "x.pkl", "a.txt"):
        assert logical_name(file) is None
