from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.core.session import set_defaults
from qtorch.data import FrameSource, write_qlib
from qtorch.data.handler.loader import (
    NestedDataLoader,
    QlibDataLoader,
    StaticDataLoader,
    build_loader,
)
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.processor import TimeRangeFlt

DATES = pd.bdate_range("2020-01-01", periods=30)
NAMES = ["A", "B", "C", "D"]


def bars_frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(3)
    close = 10 + rng.random(len(index)).astype(np.float32)
    frame = pd.DataFrame({"close": close, "open": close - 0.5, "volume": 100.0}, index)
    late = (index.get_level_values(1) == "D") & (index.get_level_values(0) < DATES[10])
    return frame[~late]


@pytest.fixture
def source() -> FrameSource:
    members = {"A": [(DATES[0], DATES[9]), (DATES[20], DATES[29])], "D": [(DATES[0], DATES[29])]}
    return FrameSource(bars_frame(), universes={"some": members})


FIELDS = {
    "feature": (["$close-$open", "Ref($close, 5)"], ["GAP", "OLD"]),
    "label": ["Ref($close,-2)"],
}


def test_groups_names_and_values(source: FrameSource) -> None:
    loader = QlibDataLoader(FIELDS)
    frame = loader.view(None, source=source).frame()
    assert list(frame.columns) == [
        ("feature", "GAP"),
        ("feature", "OLD"),
        ("label", "Ref($close,-2)"),
    ]
    close = bars_frame()["close"].unstack()
    np.testing.assert_allclose(frame["feature"]["GAP"], 0.5, rtol=1e-5)
    expected_values = close.shift(5).stack(future_stack=True).reindex(frame.index)
    np.testing.assert_array_equal(frame["feature"]["OLD"], expected_values)
    assert loader.horizon() == 2
    assert loader.horizon("nothing") is None
    assert loader.names() == {"feature": ("GAP", "OLD"), "label": ("Ref($close,-2)",)}


def test_dates_are_inclusive_and_expressions_read_rows_outside_them(source: FrameSource) -> None:
    view = QlibDataLoader(FIELDS).view(["A", "B"], "2020-01-20", "2020-01-24", source=source)
    frame = view.frame()
    dates = frame.index.get_level_values("datetime")
    assert (dates.min(), dates.max()) == (pd.Timestamp("2020-01-20"), pd.Timestamp("2020-01-24"))
    assert not frame.isna().any().any()
    close = bars_frame()["close"].unstack()
    expected_label = close.shift(-2).loc["2020-01-20":"2020-01-24", ["A", "B"]].stack()
    np.testing.assert_array_equal(frame["label"].iloc[:, 0], expected_label.reindex(frame.index))


def test_history_is_not_stored_and_packing_needs_no_copy(source: FrameSource) -> None:
    view = QlibDataLoader(FIELDS).view(None, "2020-01-20", None, source=source)
    columns = view.group("feature")
    assert isinstance(columns, PanelColumns)
    pack = columns.pack("cpu", history=view.history)
    assert pack.values.shape == (4, len(view.calendar), 2)
    assert pack.values.data_ptr() == columns.column("GAP").data_ptr()


def test_membership_limits_rows_but_not_the_history_of_values(source: FrameSource) -> None:
    frame = QlibDataLoader(FIELDS).view("some", source=source).frame()
    a = frame.xs("A", level="instrument")
    assert list(a.index) == [*DATES[:10], *DATES[20:]]
    assert not a.loc[DATES[20]].isna().any()  # five days earlier it was not a member
    assert set(frame.index.get_level_values("instrument")) == {"A", "D"}
    assert frame.xs("D", level="instrument").index[0] == DATES[10]


def test_only_requested_columns_are_computed(source: FrameSource) -> None:
    loader = QlibDataLoader(FIELDS)
    view = loader.view(None, source=source, columns={"feature": ("OLD",)})
    assert view.group("feature").names == ("OLD",)
    assert "label" not in view.groups


def test_a_list_of_fields_has_no_groups(source: FrameSource) -> None:
    frame = QlibDataLoader(["$close", "$open"], source=source).load(["B"])
    assert list(frame.columns) == ["$close", "$open"]
    assert frame.shape == (30, 2)


def test_the_default_source_comes_from_init(tmp_path: Path, source: FrameSource) -> None:
    loader = QlibDataLoader(["$close"])
    with pytest.raises(ConfigError, match=r"no data source: pass source="):
        loader.load(["A"])
    set_defaults(provider_uri=str(write_qlib(source, tmp_path / "data")))
    assert len(loader.load(["A"])) == 30


def test_a_source_from_a_folder_or_configuration(tmp_path: Path, source: FrameSource) -> None:
    folder = write_qlib(source, tmp_path / "data")
    for source_config in (
        str(folder),
        folder,
        {"class": "QlibSource", "kwargs": {"provider_uri": str(folder)}},
    ):
        assert len(QlibDataLoader(["$close"], source=source_config).load(["A"])) == 30


@pytest.mark.parametrize("field", ["P($$roewa_q)", "PRef($$x, 201801)", "$$roe"])
def test_point_in_time_fields_are_refused(field: str) -> None:
    with pytest.raises(DataError, match="point-in-time field, which qtorch does not support"):
        QlibDataLoader({"feature": ["$close", field]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config is empty"),
        ({"feature": []}, "expected a list of expressions"),
        ({"feature": (["$close"], ["A", "B"])}, "got 1 expressions but 2 names"),
        ({"feature": (["$close", "$open"], ["A", "A"])}, r"duplicates: \['A'\]"),
    ],
)
def test_invalid_configs_are_refused(config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QlibDataLoader(config)


def test_unknown_arguments_and_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'filter_pipe'"):
        QlibDataLoader(["$close"], filter_pip=[])
    with pytest.raises(ConfigError, match="swap_level=False"):
        QlibDataLoader(["$close"], swap_level=False)
    with pytest.raises(ConfigError, match="different frequencies"):
        QlibDataLoader({"a": ["$close"], "b": ["$close"]}, freq={"a": "day", "b": "1min"})


def test_inst_processors_process_each_instrument(source: FrameSource) -> None:
    def halve(df: pd.DataFrame, instrument: str) -> pd.DataFrame:
        return df.iloc[:0] if instrument == "B" else df.iloc[1:] / 2

    plain = QlibDataLoader(["$close"]).view(None, source=source).frame()
    frame = QlibDataLoader(["$close"], inst_processors=[halve]).view(None, source=source).frame()
    names = frame.index.get_level_values("instrument")
    assert set(names) == {"A", "C", "D"}
    assert (names == "A").sum() == 29
    np.testing.assert_array_equal(frame, plain.reindex(frame.index) / 2)
    config = {"class": "TimeRangeFlt", "kwargs": {"start_time": "2020-01-01"}}
    for processor in (TimeRangeFlt(DATES[0]), config):
        loader = QlibDataLoader(["$close"], inst_processors=[processor], source=source)
        assert set(loader.load().index.get_level_values("instrument")) == {"A", "B", "C"}


def test_inst_processors_may_not_resample(source: FrameSource) -> None:
    def weekly(df: pd.DataFrame, instrument: str) -> pd.DataFrame:
        return df.resample("W").last()

    with pytest.raises(DataError, match="resampling is not supported"):
        QlibDataLoader(["$close"], inst_processors=[weekly]).view(None, source=source)


# -- frames ----------------------------------------------------------------------------------------


def test_static_frame_by_instruments_and_dates() -> None:
    frame = bars_frame()
    loader = StaticDataLoader(frame)
    pd.testing.assert_frame_equal(
        loader.load(), frame.sort_index().astype(np.float32), check_index_type=False
    )
    part = loader.load(["B", "D"], "2020-01-10", "2020-01-17")
    expected_frame = frame.loc["2020-01-10":"2020-01-17"]
    expected_frame = expected_frame[expected_frame.index.get_level_values(1).isin(["B", "D"])]
    pd.testing.assert_frame_equal(part, expected_frame.astype(np.float32), check_index_type=False)


def test_static_frames_are_joined(tmp_path: Path) -> None:
    close = bars_frame()[["close"]]
    open_ = bars_frame()[["open"]].iloc[7:]
    open_.to_parquet(tmp_path / "right.parquet")
    parts = {"feature": close, "label": tmp_path / "right.parquet"}
    outer = StaticDataLoader(parts).load()
    assert len(outer) == len(close)
    assert outer[("label", "open")].isna().sum() == 7
    assert len(StaticDataLoader(parts, join="inner").load()) == len(open_)


def test_static_loader_reads_csv(tmp_path: Path) -> None:
    frame = bars_frame()
    frame.to_csv(tmp_path / "bars.csv")
    loaded_frame = StaticDataLoader(str(tmp_path / "bars.csv")).load()
    pd.testing.assert_frame_equal(
        loaded_frame, frame.astype(np.float32), check_index_type=False, atol=1e-6
    )


def test_groups_of_columns_come_back_from_a_file(tmp_path: Path) -> None:
    frame = bars_frame()[["open", "close"]]
    frame.columns = pd.MultiIndex.from_tuples([("feature", "open"), ("label", "close")])
    frame.to_parquet(tmp_path / "bars.parquet")
    loader = StaticDataLoader(tmp_path / "bars.parquet")
    assert list(loader.view().groups) == ["feature", "label"]
    pd.testing.assert_frame_equal(loader.load(), StaticDataLoader(frame).load())


def test_static_universe_comes_from_a_source(source: FrameSource) -> None:
    loader = StaticDataLoader(bars_frame())
    with pytest.raises(DataError, match="frames have no universes"):
        loader.load("some")
    rows = loader.view("some", source=source).frame().xs("A", level="instrument")
    assert list(rows.index) == [*DATES[:10], *DATES[20:]]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"x": [1.0]}), "expected an index or columns"),
        (bars_frame().iloc[[0, 0]], "duplicate"),
        (bars_frame().assign(name="x"), "must be numeric"),
        (bars_frame().tz_localize("UTC", level=0), "time zone"),
    ],
)
def test_invalid_frames_are_refused(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        StaticDataLoader(frame).load()


def test_the_rows_of_a_frame_may_be_in_any_order() -> None:
    frame = bars_frame()
    pd.testing.assert_frame_equal(
        StaticDataLoader(frame.iloc[::-1]).load(), StaticDataLoader(frame).load()
    )


def test_missing_files_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        StaticDataLoader(tmp_path / "no.parquet").load()
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected a \.parquet or \.csv"):
        StaticDataLoader(tmp_path / "x.txt").load()
    with pytest.raises(ConfigError, match="unknown join 'outter'"):
        StaticDataLoader(bars_frame(), join="outter")


# -- nesting ---------------------------------------------------------------------------------------


def test_nested_loader_keeps_the_first_loaders_rows_and_sorts_columns(source: FrameSource) -> None:
    user_frame = bars_frame()[["volume"]].rename(columns={"volume": "extra"}).iloc[20:]
    user_frame = user_frame.assign(GAP=7.0)
    user_frame.columns = pd.MultiIndex.from_product([["feature"], user_frame.columns])
    loader = NestedDataLoader([QlibDataLoader(FIELDS, source=source), StaticDataLoader(user_frame)])
    frame = loader.load("some")
    first = QlibDataLoader(FIELDS, source=source).load("some")
    assert frame.index.equals(first.index)
    assert list(frame.columns) == sorted(frame.columns)
    assert set(frame["feature"].columns) == {"GAP", "OLD", "extra"}
    has_row = frame.index.isin(user_frame.index)
    assert (frame.loc[has_row, ("feature", "GAP")] == 7.0).all()  # the column of the later loader
    assert frame.loc[~has_row, ("feature", "GAP")].isna().all()
    np.testing.assert_array_equal(frame["feature"]["OLD"], first["feature"]["OLD"])
    assert loader.horizon() == 2


class OldLoader:
    """A loader with Qlib's protocol and nothing else."""

    def load(self, instruments, start_time=None, end_time=None) -> pd.DataFrame:
        return bars_frame().loc[start_time:end_time]


def test_any_object_with_load_is_a_loader() -> None:
    view = build_loader(OldLoader()).view(None, "2020-01-10", "2020-01-13")
    assert len(view.calendar) == 2
    assert torch.equal(view.rows, torch.tensor([[True] * 3] * 2))
    with pytest.raises(ConfigError, match=r"unknown name in qtorch\.data 'QlibDataLoder'"):
        build_loader({"class": "QlibDataLoder"})
