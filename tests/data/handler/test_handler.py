from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.data import DataHandler, DataHandlerLP, DatasetH, FrameSource
from qtorch.data.handler.loader import DataLoader, QlibDataLoader, StaticDataLoader
from qtorch.data.processor import Processor, ZScoreNorm

DATES = pd.bdate_range("2020-01-01", periods=40)
NAMES = ["A", "B", "C", "D", "E"]
WINDOW = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-01-31"}
ZSCORE = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}


def make_frame(seed: int = 0) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(seed)
    columns = pd.MultiIndex.from_tuples([("feature", "x"), ("feature", "y"), ("label", "LABEL0")])
    values = rng.standard_normal((len(index), 3)).astype(np.float32)
    values[-10:, 2] = np.nan
    return pd.DataFrame(values, index, columns)


@pytest.fixture
def frame() -> pd.DataFrame:
    return make_frame()


# -- fetch -----------------------------------------------------------------------------------------


def test_column_sets(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    assert list(handler.fetch().columns) == ["x", "y", "LABEL0"]
    raw = handler.fetch(col_set=DataHandler.CS_RAW)
    pd.testing.assert_frame_equal(raw, frame, check_index_type=False, check_column_type=False)
    assert list(handler.fetch(col_set="feature").columns) == ["x", "y"]
    two_groups = handler.fetch(col_set=["label", "feature"])
    assert list(two_groups.columns) == [("label", "LABEL0"), ("feature", "x"), ("feature", "y")]
    assert handler.get_cols() == ["x", "y", "LABEL0"]
    assert handler.get_cols("__raw") == [("feature", "x"), ("feature", "y"), ("label", "LABEL0")]
    assert handler.get_cols("label") == ["LABEL0"]
    with pytest.raises(ConfigError, match="Did you mean 'feature'"):
        handler.fetch(col_set="features")


@pytest.mark.parametrize(
    ("selector", "level"),
    [
        (slice("2020-01-10", "2020-01-20"), "datetime"),
        (slice("2020-01-11", None), "datetime"),
        (["2020-01-10", "2020-01-20"], "datetime"),
        ("2020-01-10", "datetime"),
        ("2020-02", "datetime"),
        (pd.Timestamp("2020-01-13"), 0),
        (DATES[[3, 7]], "datetime"),
        ("B", "instrument"),
        (slice("B", "D"), "instrument"),
        (["A", "E"], 1),
        (pd.MultiIndex.from_tuples([(DATES[3], "B"), (DATES[9], "A")]), None),
    ],
)
def test_selectors_behave_as_in_pandas(frame: pd.DataFrame, selector, level) -> None:
    selection = DataHandler(data_loader=frame).fetch(selector, level=level, col_set="__raw")
    if isinstance(selector, pd.MultiIndex):
        expected_frame = frame.loc[selector]
    elif level in ("datetime", 0):
        span = slice(*selector) if isinstance(selector, list) else selector
        expected_frame = frame.loc[pd.IndexSlice[span, :], :]
    else:
        names = frame.index.get_level_values(1)
        selected_names = list("BCD" if isinstance(selector, slice) else selector)
        expected_frame = frame[names.isin(selected_names)]
    np.testing.assert_array_equal(selection.to_numpy(), expected_frame.to_numpy())
    assert list(selection.index) == list(expected_frame.index)


def test_squeeze_and_proc_func(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    label = handler.fetch(col_set="label", squeeze=True)
    assert isinstance(label, pd.Series)
    day = handler.fetch("2020-01-10", squeeze=True)
    assert day.index.names == ["instrument"]
    doubled_features = handler.fetch(col_set="feature", proc_func=lambda df: df * 2)
    np.testing.assert_array_equal(doubled_features, frame["feature"] * 2)


def test_fetched_frames_are_copies(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    fetched_frame = handler.fetch(col_set="__raw")
    fetched_frame.loc[:, :] = 0.0
    fetched_frame["label"] = 1.0
    np.testing.assert_array_equal(handler.fetch(col_set="__raw"), frame)


def test_range_selector_and_iterator(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    assert handler.get_range_selector(DATES[5], 3) == slice(DATES[3], DATES[5])
    dates, frames = zip(*handler.get_range_iterator(3, min_periods=38), strict=True)
    assert list(dates) == list(DATES[38:])
    assert [len(f) for f in frames] == [15, 15]
    with pytest.warns(UserWarning, match="too large"):
        assert handler.get_range_selector(DATES[1], 9) == slice(DATES[0], DATES[1])


def test_a_frame_without_groups_keeps_one_level(frame: pd.DataFrame) -> None:
    flat = frame.droplevel(0, axis=1)
    handler = DataHandlerLP.from_df(flat)
    assert list(handler.fetch(col_set=["feature", "label"]).columns) == ["x", "y", "LABEL0"]
    labelled_handler = DataHandlerLP.from_df(flat, label="LABEL0")
    assert list(labelled_handler.fetch(col_set="label").columns) == ["LABEL0"]
    assert labelled_handler.get_cols("feature") == ["x", "y"]
    with pytest.raises(ConfigError, match="Did you mean 'LABEL0'"):
        DataHandlerLP.from_df(flat, label="LABEL")


# -- processing ------------------------------------------------------------------------------------


def zscore(frame: pd.DataFrame, end: str = WINDOW["fit_end_time"]) -> pd.DataFrame:
    fit_frame = frame["feature"].loc[:end].astype(np.float64)
    return (frame["feature"] - fit_frame.mean()) / fit_frame.std(ddof=0)


@pytest.mark.parametrize("kind", ["append", "independent"])
def test_the_three_views(frame: pd.DataFrame, kind: str) -> None:
    handler = DataHandlerLP.from_df(
        frame,
        infer_processors=[ZSCORE],
        learn_processors=[
            "DropnaLabel",
            {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
        ],
        process_type=kind,
        **WINDOW,
    )
    np.testing.assert_array_equal(handler.fetch(col_set="__raw", data_key="raw"), frame)
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscore(frame), atol=1e-5)
    learn = handler.fetch(col_set="__raw", data_key="learn")
    complete_rows = frame.dropna()
    features = (
        zscore(frame).loc[complete_rows.index] if kind == "append" else complete_rows["feature"]
    )
    np.testing.assert_allclose(learn["feature"], features, atol=1e-5)
    ranks = (complete_rows["label"].groupby("datetime").rank(pct=True) - 0.5) * 3.46
    np.testing.assert_allclose(learn["label"], ranks, atol=1e-5)


def test_views_share_columns_that_no_processor_writes(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, learn_processors=["DropnaLabel"])
    raw, learn = handler.view("raw"), handler.view("learn")
    assert learn.group("feature") is raw.group("feature")


def test_processors_that_need_labels_are_refused_for_inference(frame: pd.DataFrame) -> None:
    for argument in ("infer_processors", "shared_processors"):
        with pytest.raises(TypeError, match=rf"{argument} contains DropnaLabel.*learn_processors"):
            DataHandlerLP.from_df(frame, **{argument: ["DropnaLabel"]})


class Counting(Processor):
    """Count how often the processor is fitted and called, and on which dates."""

    fits: list[tuple[int, int]] = []  # noqa: RUF012 - the test reads it
    calls = 0

    def has_fit_window(self) -> bool:
        return True

    def fit(self, view) -> None:
        days = torch.nonzero(view.rows.any(1))[:, 0]
        Counting.fits.append((int(days[0]), int(days[-1])))

    def __call__(self, view):
        Counting.calls += 1
        return view


def test_data_is_loaded_on_first_use_and_fitted_once_on_the_window(frame: pd.DataFrame) -> None:
    Counting.fits, Counting.calls = [], 0
    handler = DataHandlerLP.from_df(frame, infer_processors=[Counting()], **WINDOW)
    assert Counting.calls == 0
    for key in ("infer", "learn", "infer"):
        handler.fetch(data_key=key)
    assert Counting.fits == [(0, DATES.get_loc("2020-01-31"))]
    assert Counting.calls == 1


def test_a_missing_fit_window_is_an_error_until_a_train_segment_is_bound(
    frame: pd.DataFrame,
) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    with pytest.raises(ConfigError, match=r"ZScoreNorm needs a fit window"):
        handler.fetch()
    handler.bind_train_segment("2020-01-01", "2020-01-31")
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscore(frame), atol=1e-5)


def test_a_train_segment_without_rows_is_an_error(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    handler.bind_train_segment("2031-01-01", "2031-12-31")
    with pytest.raises(DataError, match=r"fit window 2031-01-01\.\.2031-12-31 .* covers 2020-01-"):
        handler.fetch()


def test_the_fit_window_follows_the_train_segment(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    for end in ("2020-01-31", "2020-02-14"):
        handler.bind_train_segment("2020-01-01", end)
        features = handler.fetch(col_set="feature")
        np.testing.assert_allclose(features, zscore(frame, end), atol=1e-5)


@pytest.mark.parametrize(
    ("group", "argument", "is_logged"),
    [
        (None, "infer_processors", True),
        ("label", "shared_processors", True),
        (["feature", "label"], "infer_processors", True),
        ("feature", "infer_processors", False),
        ("label", "learn_processors", False),
    ],
)
def test_dropping_test_rows_by_their_label_is_logged(
    frame: pd.DataFrame, caplog, group, argument: str, is_logged: bool
) -> None:
    processor = {"class": "DropnaProcessor", "kwargs": {"fields_group": group}}
    DataHandlerLP.from_df(frame, **{argument: [processor]}).fetch()
    assert ("DropnaProcessor runs before inference" in caplog.text) == is_logged


def test_a_fit_window_beyond_the_train_segment_is_refused(frame: pd.DataFrame, caplog) -> None:
    def bind_handler(**options) -> DataHandlerLP:
        handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE], **options)
        handler.bind_train_segment("2020-01-06", "2020-01-24")
        return handler

    with pytest.raises(ConfigError, match=r"reaches beyond the train segment.*evaluated on"):
        bind_handler(**WINDOW).fetch()
    with pytest.raises(ConfigError, match="begins before the train segment"):
        bind_handler(fit_start_time="2020-01-01", fit_end_time="2020-01-24").fetch()
    bind_handler(
        fit_start_time="2020-01-04", fit_end_time="2020-01-26"
    ).fetch()  # no more trading days
    bind_handler(**WINDOW, allow_wide_fit=True).fetch()
    assert "allow_wide_fit=True" in caplog.text
    own = ZScoreNorm("2020-01-01", "2020-02-14", fields_group="feature")
    handler = DataHandlerLP.from_df(frame, infer_processors=[own])
    handler.bind_train_segment("2020-01-01", "2020-01-24")
    with pytest.raises(ConfigError, match=r"ZScoreNorm would be fitted on 2020-01-01\.\.2020-02"):
        handler.fetch()


def test_a_processors_own_fit_window_takes_precedence(frame: pd.DataFrame) -> None:
    own = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature", **WINDOW}}
    handler = DataHandlerLP.from_df(
        frame, infer_processors=[own], fit_start_time="2020-01-01", fit_end_time="2020-01-10"
    )
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscore(frame), atol=1e-5)


def test_all_forms_of_processor_configurations(frame: pd.DataFrame) -> None:
    forms = [
        ZSCORE,
        {"_target_": "qtorch.data.processor.ZScoreNorm", "fields_group": "feature"},
        {"class": "qtorch.data.processor.ZScoreNorm", "kwargs": {"fields_group": "feature"}},
        ZScoreNorm(fields_group="feature"),
    ]
    for form in forms:
        handler = DataHandlerLP.from_df(frame, infer_processors=[form], **WINDOW)
        np.testing.assert_allclose(handler.fetch(col_set="feature"), zscore(frame), atol=1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'ZScoreNorm'"):
        DataHandlerLP.from_df(frame, infer_processors=["ZScoreNrm"])
    with pytest.raises(ArgumentError, match="Did you mean 'fields_group'"):
        DataHandlerLP.from_df(
            frame, infer_processors=[{"class": "Fillna", "kwargs": {"field_group": "feature"}}]
        )


def test_drop_raw_keeps_only_the_label(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, drop_raw=True)
    handler.fetch()
    np.testing.assert_array_equal(handler.fetch(col_set="label", data_key="raw"), frame["label"])
    with pytest.raises(ConfigError, match="drop_raw=False"):
        handler.fetch(data_key="raw")


def test_invalid_keys_and_types_are_refused(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame)
    with pytest.raises(ConfigError, match="Did you mean 'learn'"):
        handler.fetch(data_key="lern")
    with pytest.raises(ConfigError, match="unknown process_type 'appended'"):
        DataHandlerLP.from_df(frame, process_type="appended")
    with pytest.raises(ConfigError, match="needs data_loader"):
        DataHandlerLP()
    with pytest.raises(ConfigError, match="unknown init_type"):
        handler.setup_data(init_type="fit")


# -- column selection ------------------------------------------------------------------------------


class Recording(QlibDataLoader):
    """Record the requested columns of each call."""

    def view(self, *args, columns=None, **kwargs):
        requested_columns.append(columns)
        return super().view(*args, columns=columns, **kwargs)


requested_columns: list = []


@pytest.fixture
def source() -> FrameSource:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(5)
    close = 10 + rng.random(len(index)).astype(np.float32)
    return FrameSource(pd.DataFrame({"close": close, "open": close - 0.5}, index))


@pytest.mark.parametrize("kind", ["append", "independent"])
def test_filtered_columns_are_not_computed(source: FrameSource, kind: str) -> None:
    requested_columns.clear()
    names = ["A", "B", "C"]
    fields = {"feature": (["$close", "$open", "$close-$open"], names), "label": ["$close"]}
    keep = {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": ["C", "A"]}}
    handler = DataHandlerLP(
        data_loader=Recording(fields),
        infer_processors=[ZSCORE, keep],
        source=source,
        process_type=kind,
        **WINDOW,
    )
    assert handler.get_cols("feature") == ["A", "C"]
    if kind == "append":
        assert requested_columns == [{"feature": ("A", "C"), "label": ("$close",)}]
        label = handler.fetch(col_set="label", data_key="raw")
        assert len(requested_columns) == 1  # the label is already loaded
        assert label.shape == (200, 1)
    else:
        assert requested_columns == [None]  # the learn view needs all columns
        assert handler.get_cols("feature", "learn") == names
    raw = handler.fetch(col_set="feature", data_key="raw")
    assert list(raw.columns) == names
    assert len(requested_columns) == (2 if kind == "append" else 1)
    whole = DataHandlerLP(data_loader=QlibDataLoader(fields), source=source, **WINDOW)
    np.testing.assert_array_equal(raw, whole.fetch(col_set="feature"))


def test_a_missing_group_does_not_reload_data(source: FrameSource) -> None:
    requested_columns.clear()
    fields = {"feature": (["$close", "$open"], ["A", "B"])}
    keep = {"class": "FilterCol", "kwargs": {"col_list": ["A"]}}
    handler = DataHandlerLP(data_loader=Recording(fields), infer_processors=[keep], source=source)
    dataset = DatasetH(handler, {"test": ("2020-01-01", "2020-01-31")})
    assert dataset.samples("test", data_key="infer").raw_label is None
    assert len(requested_columns) == 1


def test_a_processor_that_reads_every_column_needs_every_column(source: FrameSource) -> None:
    requested_columns.clear()
    fields = {"feature": (["$close", "Ref($open, 3)"], ["A", "B"])}
    keep = {"class": "FilterCol", "kwargs": {"col_list": ["A"]}}
    handler = DataHandlerLP(
        data_loader=Recording(fields), infer_processors=["DropnaProcessor", keep], source=source
    )
    assert len(handler.fetch()) == 37 * 5  # B is missing on three days
    assert requested_columns == [None]


# -- storage ---------------------------------------------------------------------------------------


def test_config_and_load_state_reach_a_later_end_without_fitting(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE], **WINDOW)
    handler.config(end_time="2020-02-05")
    first = handler.fetch(col_set="feature")
    assert first.index[-1][0] == pd.Timestamp("2020-02-05")
    handler.config(
        end_time="2020-02-20",
        processor_kwargs={"fit_start_time": "2020-02-01", "fit_end_time": "2020-02-10"},
    )
    handler.setup_data(init_type=DataHandlerLP.IT_LS)
    later = handler.fetch(col_set="feature")
    assert later.index[-1][0] == pd.Timestamp("2020-02-20")
    pd.testing.assert_frame_equal(later.loc[first.index], first)
    handler.setup_data()  # fit_seq: the processors' new window
    assert not np.allclose(handler.fetch(col_set="feature").loc[first.index], first)


def test_inference_works_without_labels(frame: pd.DataFrame) -> None:
    frame["label"] = np.nan
    handler = DataHandlerLP.from_df(
        frame, infer_processors=[ZSCORE], learn_processors=["DropnaLabel"], **WINDOW
    )
    assert len(handler.fetch()) == 200
    with pytest.raises(DataError, match="drops all 200 rows"):
        handler.fetch(data_key="learn")


def test_a_pickle_keeps_the_fitted_processors(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    handler.bind_train_segment("2020-01-01", "2020-01-31")
    expected_frame = handler.fetch()
    restored_handler = pickle.loads(pickle.dumps(handler))
    restored_handler.bind_train_segment("2020-01-01", "2020-01-10")
    pd.testing.assert_frame_equal(restored_handler.fetch(), expected_frame)


def test_fit_ind_fits_on_raw_data(frame: pd.DataFrame) -> None:
    double = {"class": "MinMaxNorm", "kwargs": {"fields_group": "feature"}}
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE, double], **WINDOW)
    handler.setup_data(init_type=DataHandlerLP.IT_FIT_IND)
    low, high = (getattr(frame["feature"].loc[:"2020-01-31"], m)() for m in ("min", "max"))
    expected_features = (zscore(frame) - low) / (high - low)
    np.testing.assert_allclose(handler.fetch(col_set="feature"), expected_features, atol=1e-4)


def test_pickles_contain_data_only_with_dump_all(frame: pd.DataFrame, tmp_path: Path) -> None:
    handler = DataHandlerLP(data_loader=StaticDataLoader(None), infer_processors=[ZSCORE], **WINDOW)
    handler._raw = DataHandlerLP.from_df(frame).view("raw")
    expected_features = handler.fetch(col_set="feature")
    restored_handler = pickle.loads(pickle.dumps(handler))
    assert restored_handler._infer is None
    handler.to_pickle(tmp_path / "all.pkl", dump_all=True)
    cast = DataHandlerLP.cast(handler)
    cast.to_pickle(tmp_path / "cast.pkl", dump_all=True)
    with (tmp_path / "cast.pkl").open("rb") as file:
        cast_handler = pickle.load(file)
    pd.testing.assert_frame_equal(cast_handler.fetch(col_set="feature"), expected_features)
    with pytest.raises(ConfigError, match="has no raw data"):
        cast_handler.fetch(data_key="raw")


def test_an_empty_span_error_names_the_dates_of_the_data(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"the data covers 2020-01-01..2020-02-25"):
        DataHandler(None, "2021-01-01", "2021-02-01", data_loader=frame).fetch()


def test_the_fingerprint_depends_on_the_content(frame: pd.DataFrame, source: FrameSource) -> None:
    first, second = DataHandler(data_loader=frame), DataHandler(data_loader=make_frame())
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != DataHandler(data_loader=make_frame(1)).fingerprint()
    bars = DataHandler(data_loader=QlibDataLoader(["$close"]), source=source)
    assert bars.fingerprint() == source.fingerprint()


def test_a_loader_must_override_view_or_load() -> None:
    class Empty(DataLoader):
        pass

    with pytest.raises(ConfigError, match="must override view"):
        DataHandler(data_loader=Empty()).fetch()


def test_a_handler_shows_its_dates_and_its_source_the_bars() -> None:
    frame = pd.DataFrame({"close": 1.0, "open": 1.0}, make_frame().index)
    source = FrameSource(frame)
    size = "40 dates 2020-01-01..2020-02-25, 5 instruments"
    assert repr(source) == f"FrameSource({size}, fields close, open)"
    loader = QlibDataLoader({"feature": ["$close"]})
    handler = DataHandler("all", data_loader=loader, source=source)
    assert repr(handler) == "DataHandler(all, all dates, not loaded)"
    assert size in DatasetH(handler, {"train": ("2020-01-01", None)})._repr_html_()
    handler.fetch()
    assert repr(handler) == "DataHandler(all, 2020-01-01..2020-02-25, loaded)"
    late = DataHandler("all", "2020-02-01", data_loader=loader, source=source)
    assert repr(late) == "DataHandler(all, 2020-02-01.., not loaded)"
