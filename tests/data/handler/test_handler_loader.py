"""DataLoaderDH: the data of other handlers as the raw data of a handler."""

from __future__ import annotations

import subprocess

import numpy as np
import pandas as pd
import pytest

from qtorch import init_instance_by_config
from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.core.qlib.translation import translate_config
from qtorch.data import DataHandlerLP, DataLoaderDH, DatasetH, NestedDataLoader, StaticDataLoader

DATES = pd.bdate_range("2020-01-01", periods=20, name="datetime")
SEGMENTS = {"train": (DATES[0], DATES[9]), "test": (DATES[13], DATES[19])}


def frame(columns: dict[str, list[str]], names: str = "AB", seed: int = 0) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DATES, list(names)], names=["datetime", "instrument"])
    pairs = [(group, name) for group, part in columns.items() for name in part]
    values = np.random.default_rng(seed).normal(size=(len(index), len(pairs))).astype(np.float32)
    return pd.DataFrame(values, index, pd.MultiIndex.from_tuples(pairs))


@pytest.fixture
def handler() -> DataHandlerLP:
    processors = [{"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}]
    return DataHandlerLP.from_df(
        frame({"feature": ["F0", "F1"], "label": ["L"]}), infer_processors=processors
    )


def test_one_handlers_data_are_loaded_by_key_and_columns(handler):
    handler.bind_train_segment(*SEGMENTS["train"])
    expected = handler.fetch(slice(DATES[2], DATES[5]), col_set="__raw", data_key="raw")
    loader = DataLoaderDH(handler, {"data_key": "raw"})
    pd.testing.assert_frame_equal(loader.load(None, DATES[2], DATES[5]), expected)
    processed = handler.fetch(col_set="__raw")
    pd.testing.assert_frame_equal(DataLoaderDH(handler).load(), processed)
    feature = handler.fetch(col_set="feature")
    pd.testing.assert_frame_equal(DataLoaderDH(handler, {"col_set": "feature"}).load(), feature)
    chosen = DataLoaderDH(handler, {"col_set": ["label"]}).load()
    assert list(chosen.columns) == [("label", "L")]
    all_columns = DataLoaderDH(handler, {"col_set": "__all"}).load()
    assert list(all_columns.columns) == ["F0", "F1", "L"]
    with pytest.raises(DataError, match="no date between"):
        DataLoaderDH(handler).load(None, "2021-01-01", "2021-02-01")


def test_several_handlers_become_groups(handler):
    other = DataHandlerLP.from_df(frame({"feature": ["G"]}, names="BC", seed=1))
    handler.bind_train_segment(*SEGMENTS["train"])
    loader = DataLoaderDH({"own": handler, "other": other}, {"col_set": "feature"}, is_group=True)
    loaded = loader.load()
    assert list(loaded.columns) == [("own", "F0"), ("own", "F1"), ("other", "G")]
    own = handler.fetch(col_set="feature")
    pd.testing.assert_frame_equal(loaded["own"].dropna(how="all"), own)
    assert loaded["other"].dropna().index.equals(other.fetch().index)
    assert len(loaded) == 3 * len(DATES)
    all_columns = DataLoaderDH({"x": handler}, {"col_set": "__all"}, is_group=True).view()
    assert all_columns.group("x").names == ("F0", "F1", "L")


def test_instruments_are_ignored_with_a_warning(handler, caplog):
    handler.bind_train_segment(*SEGMENTS["train"])
    loaded = DataLoaderDH(handler).load(["A"])
    assert set(loaded.index.get_level_values(1)) == {"A", "B"}
    assert "instruments=['A'] is ignored" in caplog.text


def test_inner_processors_are_fitted_on_the_train_segment_of_the_dataset(handler):
    outer = DataHandlerLP(data_loader=DataLoaderDH(handler))
    dataset = DatasetH(outer, SEGMENTS)
    raw = handler.fetch(col_set="feature", data_key="raw")
    train = raw.loc[: DATES[9]]
    expected = (raw - train.mean()) / train.std(ddof=0)
    test = dataset.prepare("test", col_set="feature")
    np.testing.assert_allclose(test, expected.loc[test.index], rtol=1e-3, atol=1e-5)
    # Another train segment refits them, and the loaded data are read again.
    moved = {"train": (DATES[2], DATES[11]), "test": SEGMENTS["test"]}
    train = raw.loc[DATES[2] : DATES[11]]
    expected = (raw - train.mean()) / train.std(ddof=0)
    test = DatasetH(outer, moved).prepare("test", col_set="feature")
    np.testing.assert_allclose(test, expected.loc[test.index], rtol=1e-3, atol=1e-5)


def test_a_fit_window_that_sees_the_test_segment_is_refused():
    processors = [{"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}]
    inner = DataHandlerLP.from_df(
        frame({"feature": ["F0"], "label": ["L"]}),
        infer_processors=processors,
        fit_start_time=DATES[0],
        fit_end_time=DATES[19],
    )
    loaders = [DataLoaderDH(inner), StaticDataLoader(frame({"feature": ["X"]}))]
    dataset = DatasetH(DataHandlerLP(data_loader=NestedDataLoader(loaders)), SEGMENTS)
    with pytest.raises(ConfigError, match="reaches beyond the train segment"):
        dataset.prepare("test")


def test_fingerprint_and_horizon_are_those_of_the_handlers(handler):
    class Shift:
        def change_source(self, source):
            return source

        def change_view(self, view):
            return view

    loader = DataLoaderDH(handler)
    assert loader.horizon() is None
    assert loader.frequency() is None
    assert loader.bars_source("mine") == "mine"
    assert not loader.needs_source()
    other = DataHandlerLP.from_df(frame({"feature": ["F0", "F1"], "label": ["L"]}, seed=1))
    assert loader.fingerprint() == DataLoaderDH(handler).fingerprint()
    assert loader.fingerprint() != DataLoaderDH(other).fingerprint()
    changed = loader.change_data(Shift())
    handler.bind_train_segment(*SEGMENTS["train"])
    changed.bind_train_segment(*SEGMENTS["train"])
    pd.testing.assert_frame_equal(changed.load(), loader.load())


def test_a_configuration_of_qlib_builds_it(tmp_path):
    frame({"feature": ["F0"], "label": ["L"]}).to_parquet(tmp_path / "frame.parquet")
    static = {
        "class": "qlib.data.dataset.loader.StaticDataLoader",
        "kwargs": {"config": str(tmp_path / "frame.parquet")},
    }
    inner = {
        "class": "qlib.data.dataset.handler.DataHandlerLP",
        "kwargs": {"data_loader": static},
    }
    config = {
        "class": "DataLoaderDH",
        "module_path": "qlib.data.dataset.loader",
        "kwargs": {"handler_config": {"mine": inner}, "is_group": True,
                   "fetch_kwargs": {"col_set": "feature"}},
    }  # fmt: skip
    loader = init_instance_by_config(translate_config(config))
    assert list(loader.load().columns) == [("mine", "F0")]
    assert loader.to_config()["handler_config"]["mine"]["_target_"] == "qtorch.data.DataHandlerLP"


def test_wrong_arguments_are_explained(handler):
    with pytest.raises(ConfigError, match="unknown argument in fetch_kwargs 'squeeze'"):
        DataLoaderDH(handler, {"squeeze": True})
    with pytest.raises(ConfigError, match="expects a mapping of groups"):
        DataLoaderDH(handler, is_group=True)
    with pytest.raises(ConfigError, match="is one group of its handler"):
        DataLoaderDH({"a": handler}, {"col_set": ["feature"]}, is_group=True)
    with pytest.raises(ConfigError, match="expects a handler or its configuration, not a int"):
        DataLoaderDH(3)
    handler.bind_train_segment(*SEGMENTS["train"])
    with pytest.raises(ConfigError, match=r"handler of 'a' has the groups \['feature', 'label'\]"):
        DataLoaderDH({"a": handler}, is_group=True).load()
    with pytest.raises(DataError, match="feature"):
        DataLoaderDH(handler, {"col_set": "featur"}).load()
    with pytest.raises(ArgumentError, match="Did you mean 'is_group'"):
        DataLoaderDH(handler, is_grup=True)


QLIB_SCRIPT = """
import sys
import pandas as pd
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import DataLoaderDH

folder = sys.argv[1]
first, second = (DataHandlerLP.from_df(pd.read_parquet(f"{folder}/{k}.parquet")) for k in "01")
DataLoaderDH(first).load(None, "2020-01-06", "2020-01-20").to_parquet(f"{folder}/one.parquet")
loader = DataLoaderDH({"a": first, "b": second}, {"col_set": "feature"}, is_group=True)
loader.load().to_parquet(f"{folder}/groups.parquet")
"""


@pytest.mark.qlib
def test_frames_are_those_of_qlib(qlib_python, tmp_path):
    frames = [frame({"feature": ["F0", "F1"], "label": ["L"]}), frame({"feature": ["G"]}, "BC", 1)]
    for k, data in enumerate(frames):
        data.to_parquet(tmp_path / f"{k}.parquet")
    command = [qlib_python, "-c", QLIB_SCRIPT, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (DataHandlerLP.from_df(data) for data in frames)
    loaded = DataLoaderDH(first).load(None, "2020-01-06", "2020-01-20")
    pd.testing.assert_frame_equal(
        loaded, pd.read_parquet(tmp_path / "one.parquet"), check_index_type=False, check_freq=False
    )
    groups = DataLoaderDH({"a": first, "b": second}, {"col_set": "feature"}, is_group=True).load()
    expected = pd.read_parquet(tmp_path / "groups.parquet").sort_index()
    pd.testing.assert_frame_equal(groups, expected, check_index_type=False, check_freq=False)
