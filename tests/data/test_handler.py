from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError
from qtorch.data import DataHandler, DataHandlerLP, DatasetH, FrameSource
from qtorch.data.data_loader import DataLoader
from qtorch.data.loader import QlibDataLoader, StaticDataLoader
from qtorch.data.processor import Processor, ZScoreNorm

DATES = pd.bdate_range("2020-01-01", periods=40)
NAMES = ["A", "B", "C", "D", "E"]
WINDOW = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-01-31"}
ZSCORE = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature"}}


def grouped(seed: int = 0) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(seed)
    columns = pd.MultiIndex.from_tuples([("feature", "x"), ("feature", "y"), ("label", "LABEL0")])
    values = rng.standard_normal((len(index), 3)).astype(np.float32)
    values[-10:, 2] = np.nan
    return pd.DataFrame(values, index, columns)


@pytest.fixture
def frame() -> pd.DataFrame:
    return grouped()


# -- fetch -----------------------------------------------------------------------------------------


def test_column_sets(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    assert list(handler.fetch().columns) == ["x", "y", "LABEL0"]
    raw = handler.fetch(col_set=DataHandler.CS_RAW)
    pd.testing.assert_frame_equal(raw, frame, check_index_type=False, check_column_type=False)
    assert list(handler.fetch(col_set="feature").columns) == ["x", "y"]
    both = handler.fetch(col_set=["label", "feature"])
    assert list(both.columns) == [("label", "LABEL0"), ("feature", "x"), ("feature", "y")]
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
def test_selectors_are_pandas_own(frame: pd.DataFrame, selector, level) -> None:
    found = DataHandler(data_loader=frame).fetch(selector, level=level, col_set="__raw")
    if isinstance(selector, pd.MultiIndex):
        expected = frame.loc[selector]
    elif level in ("datetime", 0):
        span = slice(*selector) if isinstance(selector, list) else selector
        expected = frame.loc[pd.IndexSlice[span, :], :]
    else:
        names = frame.index.get_level_values(1)
        kept = (
            names.isin(list(selector))
            if not isinstance(selector, slice)
            else names.isin(list("BCD"))
        )
        expected = frame[kept]
    np.testing.assert_array_equal(found.to_numpy(), expected.to_numpy())
    assert list(found.index) == list(expected.index)


def test_squeeze_and_proc_func(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    label = handler.fetch(col_set="label", squeeze=True)
    assert isinstance(label, pd.Series)
    day = handler.fetch("2020-01-10", squeeze=True)
    assert day.index.names == ["instrument"]
    doubled = handler.fetch(col_set="feature", proc_func=lambda df: df * 2)
    np.testing.assert_array_equal(doubled, frame["feature"] * 2)


def test_what_is_fetched_belongs_to_the_caller(frame: pd.DataFrame) -> None:
    handler = DataHandler(data_loader=frame)
    mine = handler.fetch(col_set="__raw")
    mine.loc[:, :] = 0.0
    mine["label"] = 1.0
    np.testing.assert_array_equal(handler.fetch(col_set="__raw"), frame)


def test_ranges_of_days(frame: pd.DataFrame) -> None:
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
    named = DataHandlerLP.from_df(flat, label="LABEL0")
    assert list(named.fetch(col_set="label").columns) == ["LABEL0"]
    assert named.get_cols("feature") == ["x", "y"]
    with pytest.raises(ConfigError, match="Did you mean 'LABEL0'"):
        DataHandlerLP.from_df(flat, label="LABEL")


# -- processing ------------------------------------------------------------------------------------


def zscored(frame: pd.DataFrame, end: str = WINDOW["fit_end_time"]) -> pd.DataFrame:
    seen = frame["feature"].loc[:end].astype(np.float64)
    return (frame["feature"] - seen.mean()) / seen.std(ddof=0)


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
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscored(frame), atol=1e-5)
    learn = handler.fetch(col_set="__raw", data_key="learn")
    kept = frame.dropna()
    features = zscored(frame).loc[kept.index] if kind == "append" else kept["feature"]
    np.testing.assert_allclose(learn["feature"], features, atol=1e-5)
    ranks = (kept["label"].groupby("datetime").rank(pct=True) - 0.5) * 3.46
    np.testing.assert_allclose(learn["label"], ranks, atol=1e-5)


def test_views_share_what_no_processor_writes(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, learn_processors=["DropnaLabel"])
    raw, learn = handler.view("raw"), handler.view("learn")
    assert learn.group("feature") is raw.group("feature")


def test_a_processor_that_needs_labels_is_refused_for_inference(frame: pd.DataFrame) -> None:
    for argument in ("infer_processors", "shared_processors"):
        with pytest.raises(TypeError, match=rf"{argument} holds DropnaLabel.*learn_processors"):
            DataHandlerLP.from_df(frame, **{argument: ["DropnaLabel"]})


class Counting(Processor):
    """Counts how often it is fitted and called, and on which dates."""

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


def test_loaded_when_asked_and_fitted_once_on_the_window(frame: pd.DataFrame) -> None:
    Counting.fits, Counting.calls = [], 0
    handler = DataHandlerLP.from_df(frame, infer_processors=[Counting()], **WINDOW)
    assert Counting.calls == 0
    for key in ("infer", "learn", "infer"):
        handler.fetch(data_key=key)
    assert Counting.fits == [(0, DATES.get_loc("2020-01-31"))]
    assert Counting.calls == 1


def test_without_a_window_the_train_segment_is_asked_for(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    with pytest.raises(ConfigError, match=r"ZScoreNorm learns from the data, but no fit window"):
        handler.fetch()
    handler.bind_train("2020-01-01", "2020-01-31")
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscored(frame), atol=1e-5)


def test_a_train_segment_without_rows_is_named(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    handler.bind_train("2031-01-01", "2031-12-31")
    with pytest.raises(DataError, match=r"fit window 2031-01-01\.\.2031-12-31 .* covers 2020-01-"):
        handler.fetch()


def test_the_window_moves_with_the_train_segment(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    for end in ("2020-01-31", "2020-02-14"):
        handler.bind_train("2020-01-01", end)
        found = handler.fetch(col_set="feature")
        np.testing.assert_allclose(found, zscored(frame, end), atol=1e-5)


@pytest.mark.parametrize(
    ("group", "where", "said"),
    [
        (None, "infer_processors", True),
        ("label", "shared_processors", True),
        (["feature", "label"], "infer_processors", True),
        ("feature", "infer_processors", False),
        ("label", "learn_processors", False),
    ],
)
def test_dropping_test_rows_by_their_label_is_said(
    frame: pd.DataFrame, caplog, group, where: str, said: bool
) -> None:
    processor = {"class": "DropnaProcessor", "kwargs": {"fields_group": group}}
    DataHandlerLP.from_df(frame, **{where: [processor]}).fetch()
    assert ("DropnaProcessor stands before inference" in caplog.text) == said


def test_a_wider_window_is_refused_unless_allowed(frame: pd.DataFrame, caplog) -> None:
    def bound(**options) -> DataHandlerLP:
        handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE], **options)
        handler.bind_train("2020-01-06", "2020-01-24")
        return handler

    with pytest.raises(ConfigError, match=r"reaches beyond the train segment.*judged on"):
        bound(**WINDOW).fetch()
    with pytest.raises(ConfigError, match="begins before the train segment"):
        bound(fit_start_time="2020-01-01", fit_end_time="2020-01-24").fetch()
    bound(fit_start_time="2020-01-04", fit_end_time="2020-01-26").fetch()  # no more trading days
    bound(**WINDOW, allow_wide_fit=True).fetch()
    assert "allow_wide_fit=True" in caplog.text
    own = ZScoreNorm("2020-01-01", "2020-02-14", fields_group="feature")
    handler = DataHandlerLP.from_df(frame, infer_processors=[own])
    handler.bind_train("2020-01-01", "2020-01-24")
    with pytest.raises(ConfigError, match=r"ZScoreNorm would be fitted on 2020-01-01\.\.2020-02"):
        handler.fetch()


def test_a_processors_own_window_wins(frame: pd.DataFrame) -> None:
    own = {"class": "ZScoreNorm", "kwargs": {"fields_group": "feature", **WINDOW}}
    handler = DataHandlerLP.from_df(
        frame, infer_processors=[own], fit_start_time="2020-01-01", fit_end_time="2020-01-10"
    )
    np.testing.assert_allclose(handler.fetch(col_set="feature"), zscored(frame), atol=1e-5)


def test_processors_in_each_form(frame: pd.DataFrame) -> None:
    forms = [
        ZSCORE,
        {"_target_": "qtorch.data.processor.ZScoreNorm", "fields_group": "feature"},
        {"class": "qtorch.data.processor.ZScoreNorm", "kwargs": {"fields_group": "feature"}},
        ZScoreNorm(fields_group="feature"),
    ]
    for form in forms:
        handler = DataHandlerLP.from_df(frame, infer_processors=[form], **WINDOW)
        np.testing.assert_allclose(handler.fetch(col_set="feature"), zscored(frame), atol=1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'ZScoreNorm'"):
        DataHandlerLP.from_df(frame, infer_processors=["ZScoreNrm"])
    with pytest.raises(ArgumentError, match="Did you mean 'fields_group'"):
        DataHandlerLP.from_df(
            frame, infer_processors=[{"class": "Fillna", "kwargs": {"field_group": "feature"}}]
        )


def test_drop_raw_keeps_the_label_alone(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, drop_raw=True)
    handler.fetch()
    np.testing.assert_array_equal(handler.fetch(col_set="label", data_key="raw"), frame["label"])
    with pytest.raises(ConfigError, match="drop_raw=False"):
        handler.fetch(data_key="raw")


def test_keys_and_types_are_checked(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame)
    with pytest.raises(ConfigError, match="Did you mean 'learn'"):
        handler.fetch(data_key="lern")
    with pytest.raises(ConfigError, match="unknown process_type 'appended'"):
        DataHandlerLP.from_df(frame, process_type="appended")
    with pytest.raises(ConfigError, match="needs data_loader"):
        DataHandlerLP()
    with pytest.raises(ConfigError, match="unknown init_type"):
        handler.setup_data(init_type="fit")


# -- narrowing -------------------------------------------------------------------------------------


class Recording(QlibDataLoader):
    """Remembers which columns were asked of it."""

    def view(self, *args, columns=None, **kwargs):
        asked.append(columns)
        return super().view(*args, columns=columns, **kwargs)


asked: list = []


@pytest.fixture
def source() -> FrameSource:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    rng = np.random.default_rng(5)
    close = 10 + rng.random(len(index)).astype(np.float32)
    return FrameSource(pd.DataFrame({"close": close, "open": close - 0.5}, index))


@pytest.mark.parametrize("kind", ["append", "independent"])
def test_columns_that_are_filtered_away_are_not_computed(source: FrameSource, kind: str) -> None:
    asked.clear()
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
        assert asked == [{"feature": ("A", "C"), "label": ("$close",)}]
        label = handler.fetch(col_set="label", data_key="raw")
        assert len(asked) == 1  # the label was loaded already
        assert label.shape == (200, 1)
    else:
        assert asked == [None]  # learn has all of them
        assert handler.get_cols("feature", "learn") == names
    raw = handler.fetch(col_set="feature", data_key="raw")
    assert list(raw.columns) == names
    assert len(asked) == (2 if kind == "append" else 1)
    whole = DataHandlerLP(data_loader=QlibDataLoader(fields), source=source, **WINDOW)
    np.testing.assert_array_equal(raw, whole.fetch(col_set="feature"))


def test_a_group_that_is_not_there_loads_nothing(source: FrameSource) -> None:
    asked.clear()
    fields = {"feature": (["$close", "$open"], ["A", "B"])}
    keep = {"class": "FilterCol", "kwargs": {"col_list": ["A"]}}
    handler = DataHandlerLP(data_loader=Recording(fields), infer_processors=[keep], source=source)
    dataset = DatasetH(handler, {"test": ("2020-01-01", "2020-01-31")})
    assert dataset.samples("test", data_key="infer").raw_label is None
    assert len(asked) == 1


def test_a_step_that_reads_every_column_needs_every_column(source: FrameSource) -> None:
    asked.clear()
    fields = {"feature": (["$close", "Ref($open, 3)"], ["A", "B"])}
    keep = {"class": "FilterCol", "kwargs": {"col_list": ["A"]}}
    handler = DataHandlerLP(
        data_loader=Recording(fields), infer_processors=["DropnaProcessor", keep], source=source
    )
    assert len(handler.fetch()) == 37 * 5  # B is missing on three days
    assert asked == [None]


# -- storing ---------------------------------------------------------------------------------------


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


def test_data_without_labels_is_there_for_inference(frame: pd.DataFrame) -> None:
    frame["label"] = np.nan
    handler = DataHandlerLP.from_df(
        frame, infer_processors=[ZSCORE], learn_processors=["DropnaLabel"], **WINDOW
    )
    assert len(handler.fetch()) == 200
    with pytest.raises(DataError, match="leaves none of 200 rows"):
        handler.fetch(data_key="learn")


def test_a_pickle_keeps_what_was_learnt(frame: pd.DataFrame) -> None:
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE])
    handler.bind_train("2020-01-01", "2020-01-31")
    expected = handler.fetch()
    again = pickle.loads(pickle.dumps(handler))
    again.bind_train("2020-01-01", "2020-01-10")
    pd.testing.assert_frame_equal(again.fetch(), expected)


def test_fit_ind_fits_on_raw_data(frame: pd.DataFrame) -> None:
    double = {"class": "MinMaxNorm", "kwargs": {"fields_group": "feature"}}
    handler = DataHandlerLP.from_df(frame, infer_processors=[ZSCORE, double], **WINDOW)
    handler.setup_data(init_type=DataHandlerLP.IT_FIT_IND)
    low, high = (getattr(frame["feature"].loc[:"2020-01-31"], m)() for m in ("min", "max"))
    expected = (zscored(frame) - low) / (high - low)
    np.testing.assert_allclose(handler.fetch(col_set="feature"), expected, atol=1e-4)


def test_pickles_hold_no_data_unless_asked(frame: pd.DataFrame, tmp_path: Path) -> None:
    handler = DataHandlerLP(data_loader=StaticDataLoader(None), infer_processors=[ZSCORE], **WINDOW)
    handler._raw = DataHandlerLP.from_df(frame).view("raw")
    expected = handler.fetch(col_set="feature")
    again = pickle.loads(pickle.dumps(handler))
    assert again._infer is None
    handler.to_pickle(tmp_path / "all.pkl", dump_all=True)
    cast = DataHandlerLP.cast(handler)
    cast.to_pickle(tmp_path / "cast.pkl", dump_all=True)
    with (tmp_path / "cast.pkl").open("rb") as file:
        found = pickle.load(file)
    pd.testing.assert_frame_equal(found.fetch(col_set="feature"), expected)
    with pytest.raises(ConfigError, match="has no raw data"):
        found.fetch(data_key="raw")


def test_an_empty_span_names_what_there_is(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"the data holds 2020-01-01..2020-02-25"):
        DataHandler(None, "2021-01-01", "2021-02-01", data_loader=frame).fetch()


def test_the_fingerprint_is_of_the_content(frame: pd.DataFrame, source: FrameSource) -> None:
    one, same = DataHandler(data_loader=frame), DataHandler(data_loader=grouped())
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != DataHandler(data_loader=grouped(1)).fingerprint()
    bars = DataHandler(data_loader=QlibDataLoader(["$close"]), source=source)
    assert bars.fingerprint() == source.fingerprint()


def test_a_loader_must_give_something() -> None:
    class Empty(DataLoader):
        pass

    with pytest.raises(ConfigError, match="overrides neither"):
        DataHandler(data_loader=Empty()).fetch()
