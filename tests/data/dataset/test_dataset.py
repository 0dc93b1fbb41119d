from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.serial import State
from qtorch.data import DataHandlerLP, DatasetH, FrameSource, TSDatasetH
from qtorch.data.dataset.qlib_dataset import get_samples
from qtorch.data.handler.loader import QlibDataLoader

DATES = pd.bdate_range("2020-01-01", periods=60)
NAMES = ["A", "B", "C", "D"]
SEGMENTS = {
    "train": ("2020-01-01", "2020-01-31"),
    "valid": ("2020-02-03", "2020-02-14"),
    "test": ("2020-02-17", "2020-03-24"),
}
FIELDS = {
    "feature": (["$close/$open", "$open"], ["CO", "O"]),
    "label": (["Ref($close,-2)/Ref($close,-1)-1"], ["LABEL0"]),
}
ZSCORE = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}
LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]


def bars() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(11)
    close = (10 + rng.random(len(index))).astype(np.float32)
    return pd.DataFrame({"close": close, "open": close - rng.random(len(index)) / 2}, index)


def make_dataset(kind=DatasetH, handler: dict | None = None, **options) -> DatasetH:
    handler_options = {"infer_processors": [ZSCORE], "learn_processors": LEARN, **(handler or {})}
    handler_ = DataHandlerLP(
        "all", data_loader=QlibDataLoader(FIELDS), source=FrameSource(bars()), **handler_options
    )
    return kind(handler_, options.pop("segments", SEGMENTS), **options)


# -- prepare ---------------------------------------------------------------------------------------


def test_prepare_accepts_names_lists_and_dates() -> None:
    dataset = make_dataset()
    train = dataset.prepare("train", col_set="__raw")
    dates = train.index.get_level_values("datetime")
    assert (dates.min(), dates.max()) == (DATES[0], pd.Timestamp("2020-01-31"))
    frames = dataset.prepare(["train", "valid"], col_set="feature", data_key="learn")
    assert [len(f) for f in frames] == [23 * 4, 10 * 4]
    span = dataset.prepare(slice("2020-01-30", "2020-02-04"), col_set="label", data_key="raw")
    assert len(span) == 4 * 4
    assert len(dataset.prepare(("2020-01-30", "2020-02-04"))) == 4 * 4
    assert len(dataset.prepare("2020-02")) == 20 * 4
    with pytest.raises(ConfigError, match=r"unknown segment 'trian'\. Did you mean 'train'"):
        dataset.prepare("trian")
    with pytest.raises(TypeError, match="colset"):
        dataset.prepare("train", colset="feature")


def test_the_fit_window_is_the_train_segment() -> None:
    dataset = make_dataset()
    raw = dataset.prepare("train", col_set="feature", data_key="raw").astype(np.float64)
    features = dataset.prepare("test", col_set="feature")
    test = dataset.prepare("test", col_set="feature", data_key="raw")
    np.testing.assert_allclose(features, (test - raw.mean()) / raw.std(ddof=0), atol=1e-4)


def test_a_handler_in_two_datasets_is_fitted_for_each() -> None:
    first = make_dataset()
    later = {**SEGMENTS, "train": ("2020-01-01", "2020-01-10")}
    second = DatasetH(first.handler, later)
    first_frame, second_frame = first.prepare("test"), second.prepare("test")
    assert not np.allclose(first_frame["CO"], second_frame["CO"])
    pd.testing.assert_frame_equal(first.prepare("test"), first_frame)


def test_config_moves_segments_and_fit_window() -> None:
    dataset = make_dataset()
    before = dataset.prepare("test")
    dataset.config(segments={**SEGMENTS, "train": ("2020-01-01", "2020-01-10")})
    assert not np.allclose(dataset.prepare("test")["CO"], before["CO"])
    dataset.config(handler_kwargs={"end_time": "2020-03-02"})
    last = dataset.prepare("test").index.get_level_values("datetime").max()
    assert last == pd.Timestamp("2020-03-02")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"a": ("2020-01-01", "2020-02-01"), "b": ("2020-02-01", "2020-03-01")}, "overlap"),
        ({"a": ("2020-02-01", "2020-01-01")}, "ends"),
        ({"a": ("2020-01-01", None), "b": ("2020-02-01", None)}, "overlap"),
        ({"a": "2020-01-01"}, "must be two dates"),
        ([("2020-01-01", "2020-02-01")], "segments must be"),
    ],
)
def test_invalid_segments_are_refused(segments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_dataset(segments=segments)


def test_overlap_can_be_allowed() -> None:
    segments = {"a": ("2020-01-01", "2020-02-14"), "b": ("2020-02-03", "2020-02-28")}
    dataset = make_dataset(segments=segments, allow_overlap=True, handler={"infer_processors": []})
    assert len(dataset.prepare("b")) == 20 * 4


@pytest.mark.parametrize("kind", [DatasetH, TSDatasetH])
def test_an_empty_segment_error_names_the_dates_of_the_data(kind) -> None:
    dataset = make_dataset(kind, segments={**SEGMENTS, "test": ("2021-01-01", "2021-03-01")})
    with pytest.raises(DataError, match=r"segment 'test'.*2020-01-01\.\.2020-03-24"):
        dataset.prepare("test")
    with pytest.raises(DataError, match=r"test.*2020-01-01\.\.2020-03-24"):
        dataset.samples("test", data_key="infer")


# -- samples ---------------------------------------------------------------------------------------


def test_samples_are_the_learn_view_purged_by_the_label_horizon(caplog) -> None:
    caplog.set_level(logging.INFO)
    dataset = make_dataset()
    samples = dataset.samples("train")
    days = samples.index.get_level_values("datetime").unique()
    assert list(days) == list(DATES[:21])  # 23 days, the labels of the last 2 reach into valid
    assert "purged 8 samples" in caplog.text
    learn = dataset.prepare("train", col_set=["feature", "label"], data_key="learn")
    learn = learn.loc[: DATES[20]]
    batch = samples.batch(torch.arange(len(samples)))
    np.testing.assert_allclose(batch.x[:, 0], learn["feature"], atol=1e-6)
    np.testing.assert_allclose(batch.y, learn["label"], atol=1e-6)
    raw = dataset.prepare("train", col_set="label", data_key="raw").loc[: DATES[20]]
    np.testing.assert_allclose(batch.extra["raw_label"], raw, atol=1e-7)
    assert len(dataset.samples("train", purge=False)) == 23 * 4
    assert len(dataset.samples("train", horizon=5)) == 18 * 4
    assert len(make_dataset(horizon=1).samples("train")) == 22 * 4
    assert len(dataset.samples("valid")) == 8 * 4


def test_the_last_segment_and_prediction_are_not_purged() -> None:
    dataset = make_dataset()
    index = dataset.samples("test", data_key="infer").index
    assert list(index) == list(dataset.prepare("test").index)
    assert len(dataset.samples("test")) == 25 * 4  # 27 days, of which 2 have no label
    assert len(dataset.samples("train", data_key="infer")) == 23 * 4


def test_samples_of_dates_instead_of_a_name() -> None:
    dataset = make_dataset()
    assert len(dataset.samples(slice("2020-01-20", "2020-01-31"), purge=True)) == 8 * 4
    assert len(get_samples(dataset, slice("2020-01-20", "2020-01-31"))) == 10 * 4
    with pytest.raises(ConfigError, match="Did you mean 'valid'"):
        dataset.samples("valids")


def test_an_unknown_horizon_is_logged(caplog) -> None:
    frame = make_dataset().prepare(slice(None), col_set="__raw", data_key="raw")
    dataset = DatasetH(DataHandlerLP.from_df(frame), SEGMENTS)
    assert len(dataset.samples("train")) == 23 * 4
    assert "no samples are purged" in caplog.text


def test_windows_reach_back_and_include_rows_without_a_label() -> None:
    dataset = make_dataset(TSDatasetH, step_len=5)
    samples = dataset.samples("valid")
    assert (samples.num_steps, samples.num_features) == (5, 2)
    features = make_dataset().prepare(slice(None), col_set="feature").xs("B", level="instrument")
    row = list(samples.index).index((DATES[25], "B"))
    x = samples.batch(torch.tensor([row])).x[0]
    np.testing.assert_allclose(x, features.loc[DATES[21] : DATES[25]], atol=1e-6)
    # The last days have no label, so they are no samples, but windows can still include them.
    learn = dataset.view("learn")
    assert not learn.rows[-2:].any()
    assert learn.history.all()


def test_a_boolean_column_filters_samples() -> None:
    fields = {**FIELDS, "use": (["$close > 10.5"], ["USE"])}
    handler = DataHandlerLP("all", data_loader=QlibDataLoader(fields), source=FrameSource(bars()))
    dataset = TSDatasetH(handler, SEGMENTS, step_len=3, flt_col="use")
    is_selected = (bars()["close"] > np.float32(10.5)).sort_index().loc["2020-02-17":"2020-03-24"]
    expected_index = list(is_selected.index[is_selected])
    assert list(dataset.samples("test", data_key="infer").index) == expected_index
    sampler = dataset.prepare("test", col_set="feature")
    assert sorted(sampler.get_index()) == expected_index
    with pytest.raises(ConfigError, match="must be a group of one column"):
        dataset.prepare("test", flt_col="feature")


# -- storage ---------------------------------------------------------------------------------------


def roundtrip_state(dataset: DatasetH) -> State:
    """Return the state as it is restored from a store: plain JSON and tensors."""
    import json

    state = dataset.to_state()
    return State(json.loads(json.dumps(state.config)), dict(state.tensors))


@pytest.mark.parametrize("kind", [DatasetH, TSDatasetH])
def test_a_restored_dataset_extends_to_a_later_end_without_fitting(kind, tmp_path) -> None:
    from qtorch.data import QlibSource, write_qlib

    early, late = bars().loc[: DATES[49]], bars()
    source = QlibSource(write_qlib(FrameSource(early), tmp_path / "early"))
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qtorch.data.handler.handler",
        "kwargs": {
            "instruments": "all",
            "end_time": DATES[49],
            "data_loader": {"class": "QlibDataLoader", "kwargs": {"config": FIELDS}},
            "infer_processors": [ZSCORE],
            "source": source,
        },
    }
    segments = {**SEGMENTS, "test": ("2020-02-17", "2020-03-10")}
    first = kind(handler, segments)
    expected_frame = first.view("infer").frame(end=DATES[45])
    state = roundtrip_state(first)
    assert set(state.tensors) == {"processors.0.center_", "processors.0.scale_"}

    restored_dataset = kind.from_state(state)
    pd.testing.assert_frame_equal(
        restored_dataset.view("infer").frame(end=DATES[45]), expected_frame
    )
    # New data, a later end, and a train segment that would change the fit.
    restored_dataset.setup_data(source=str(write_qlib(FrameSource(late), tmp_path / "late")))
    restored_dataset.config(
        handler_kwargs={"end_time": "2020-03-24"},
        segments={"train": ("2020-01-01", "2020-02-10"), "test": ("2020-02-17", "2020-03-24")},
    )
    restored_dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})
    later_frame = restored_dataset.view("infer").frame()
    assert later_frame.index[-1][0] == DATES[-1]
    pd.testing.assert_frame_equal(later_frame.loc[: DATES[45]], expected_frame)


def test_a_live_frame_cannot_be_stored() -> None:
    frame = make_dataset().prepare(slice(None), col_set="__raw", data_key="raw")
    with pytest.raises(ConfigError, match="live DataFrame"):
        DatasetH(DataHandlerLP.from_df(frame), SEGMENTS).to_state()


def test_a_dataset_is_built_from_a_configuration_that_stays_unchanged() -> None:
    config = {
        "class": "TSDatasetH",
        "module_path": "qtorch.data",
        "kwargs": {
            "handler": {
                "class": "Alpha158",
                "module_path": "qtorch.data",
                "kwargs": {"instruments": "all", "source": FrameSource(bars())},
            },
            "segments": {k: list(v) for k, v in SEGMENTS.items()},
            "step_len": 4,
        },
    }
    segments = config["kwargs"]["segments"]  # type: ignore[index]
    dataset = init_instance_by_config(config)
    assert isinstance(dataset, TSDatasetH)
    dataset.config(segments=SEGMENTS, step_len=6)
    assert dataset.step_len == 6
    assert segments["train"] == list(SEGMENTS["train"])
    with pytest.raises(ConfigError, match=r"DataHandlerLP\.from_df"):
        DatasetH(config, SEGMENTS)
    with pytest.raises(ArgumentError, match="Did you mean 'step_len'"):
        TSDatasetH(dataset.handler, SEGMENTS, steplen=3)
    with pytest.raises(ConfigError, match="step_len must be at least 1"):
        TSDatasetH(dataset.handler, SEGMENTS, step_len=0)


def test_min_and_max_time_of_segments() -> None:
    assert DatasetH.get_min_time(SEGMENTS) == "2020-01-01"
    assert DatasetH.get_max_time(SEGMENTS) == "2020-03-24"
    assert DatasetH.get_max_time({"a": ("2020-01-01", None)}) is None


@pytest.mark.parametrize("kind", [DatasetH, TSDatasetH])
def test_feature_dtype_is_that_of_the_stored_features(kind) -> None:
    full, half = make_dataset(kind), make_dataset(kind, feature_dtype="bfloat16")
    samples = half.samples("train")
    rows = torch.arange(9)
    x = samples.batch(rows).x
    assert samples.feature_pack.values.dtype == torch.bfloat16
    assert torch.equal(x, full.samples("train").batch(rows).x.bfloat16().float())
    if kind is DatasetH:
        pd.testing.assert_frame_equal(half.prepare("train"), full.prepare("train"))
    with pytest.raises(ConfigError, match=r"feature_dtype 'float8'.*bfloat16"):
        make_dataset(kind, feature_dtype="float8")
