"""A partial date means its whole period: the same days in every place that takes dates."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pytest

from qtorch.core.dates import (
    as_stamp,
    bar_text,
    date_rows,
    frequency,
    last_date,
    last_instant,
    parse_frequency,
)
from qtorch.core.errors import ConfigError, DataError
from qtorch.data import (
    Concepts,
    DataHandlerLP,
    DatasetH,
    FrameSource,
    Source,
    SyntheticSource,
    TableSource,
    TSDatasetH,
)
from qtorch.data.dataset.qlib_dataset import as_samples
from qtorch.data.dataset.samples import check_segments
from qtorch.study.rolling import _select_dates, _with_shared_features
from qtorch.task.adjust import TimeAdjuster

DAYS = pd.bdate_range("2018-06-01", "2021-06-30", name="datetime")
# The dates of a segment, and the first and last day that they mean.
SEGMENTS = [
    (("2020", "2020"), ("2020-01-01", "2020-12-31")),
    (("2020-03", "2020-04"), ("2020-03-02", "2020-04-30")),
    (("2020-03", "2020"), ("2020-03-02", "2020-12-31")),
    (("2020-03-10", "2020-03-20"), ("2020-03-10", "2020-03-20")),
    (("20200310", "20200320"), ("2020-03-10", "2020-03-20")),
    ((pd.Timestamp("2020-03-10"), pd.Timestamp("2020-03-20")), ("2020-03-10", "2020-03-20")),
    ((datetime.date(2020, 3, 10), datetime.date(2020, 3, 20)), ("2020-03-10", "2020-03-20")),
    ((None, "2019"), ("2018-06-01", "2019-12-31")),
    (("2020-07", None), ("2020-07-01", "2021-06-30")),
    ((None, None), ("2018-06-01", "2021-06-30")),
]
parametrize_segments = pytest.mark.parametrize(("segment", "expected"), SEGMENTS)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DAYS, ["A", "B"]], names=["datetime", "instrument"])
    values = np.random.default_rng(0).normal(size=(len(index), 2)).astype(np.float32)
    columns = pd.MultiIndex.from_tuples([("feature", "F"), ("label", "L")])
    return pd.DataFrame(values, index=index, columns=columns)


def days(expected) -> list[pd.Timestamp]:
    return list(DAYS[(expected[0] <= DAYS) & (expected[1] >= DAYS)])


def index_days(index) -> list[pd.Timestamp]:
    return list(index.get_level_values("datetime").unique())


@parametrize_segments
def test_prepare_and_samples_have_the_same_days(frame, segment, expected):
    handler = DataHandlerLP.from_df(frame)
    dataset = DatasetH(handler, {"test": segment})
    assert index_days(dataset.prepare("test").index) == days(expected)
    assert index_days(dataset.prepare(slice(*segment)).index) == days(expected)
    for selector in ("test", slice(*segment)):
        samples = dataset.samples(selector, data_key="infer")
        assert index_days(samples.index) == days(expected)
    windows = TSDatasetH(handler, {"test": segment}, step_len=2)
    assert index_days(windows.prepare("test").get_index()) == days(expected)
    assert index_days(windows.samples("test", data_key="infer").index) == days(expected)
    assert index_days(as_samples(frame, slice(*segment), data_key="infer").index) == days(expected)


@parametrize_segments
def test_segments_agree_with_pandas(frame, segment, expected):
    closes = pd.Series(range(len(DAYS)), index=DAYS)
    bounds = [pd.Timestamp(d) if isinstance(d, datetime.date) else d for d in segment]
    assert list(closes.loc[slice(*bounds)].index) == days(expected)
    assert list(DAYS[date_rows(DAYS, *segment)]) == days(expected)


@parametrize_segments
def test_sources_adjusters_and_studies_have_the_same_days(frame, segment, expected):
    bars = frame["feature"].rename(columns={"F": "close"})
    source = FrameSource(bars)
    assert list(source.calendar(*segment)) == days(expected)
    assert list(source.load(start_time=segment[0], end_time=segment[1]).calendar) == days(expected)
    adjuster = TimeAdjuster(calendar=DAYS)
    first, last = adjuster.align_seg(segment)
    assert [first or DAYS[0], last or DAYS[-1]] == [days(expected)[0], days(expected)[-1]]
    assert index_days(_select_dates(frame, {"test": segment}, "test").index) == days(expected)


def test_spans_of_members_end_with_their_period(frame, tmp_path):
    bars = frame["feature"].rename(columns={"F": "close"})
    source = FrameSource(bars, universes={"u": {"A": [("2019", "2020-03")]}})
    expected = [(pd.Timestamp("2019-01-01"), pd.Timestamp("2020-03-31"))]
    assert source.instruments("u") == {"A": expected}
    listed = source.load(instruments={"A": [("2019", "2020-03")]})
    assert list(listed.calendar[listed.mask[:, 0].numpy()]) == days(("2019-01-01", "2020-03-31"))
    bars.to_parquet(tmp_path / "bars.parquet")
    members = tmp_path / "members.csv"
    members.write_text("universe,instrument,start,end\nu,A,2019,2020-03\nu,B,20190102,20200331\n")
    table = TableSource(tmp_path / "bars.parquet", universes=members)
    assert table.instruments("u")["A"] == expected
    assert table.instruments("u")["B"] == [(pd.Timestamp("2019-01-02"), expected[0][1])]
    concepts = tmp_path / "concepts.csv"
    concepts.write_text("instrument,concept,start,end\nA,tech,2019,2020-03\nB,tech,,2020\n")
    bound = Concepts(concepts).bind(DAYS, pd.Index(["A", "B"]))
    assert [DAYS[row] for row in bound.spans[:, 0, 2].tolist()] == [
        pd.Timestamp("2020-03-31"),
        pd.Timestamp("2020-12-31"),
    ]


def test_the_synthetic_market_ends_with_its_period():
    market: Source = SyntheticSource(3, "2019", "2020-06")
    assert market.calendar()[0] == pd.Timestamp("2019-01-01")
    assert market.calendar()[-1] == pd.Timestamp("2020-06-30")


def test_overlap_and_purging_know_the_end_of_the_period(frame):
    check_segments({"train": ("2018", "2019"), "valid": ("2020-01", "2020-06")})
    with pytest.raises(ConfigError, match=r"'train' \(to 2020-12-31\) and 'valid'.* overlap"):
        check_segments({"train": ("2018", "2020"), "valid": ("2020-06", "2020-12")})
    with pytest.raises(ConfigError, match=r"2018 is a number, not a date"):
        check_segments({"train": (2018, 2020)})
    dataset = DatasetH(
        DataHandlerLP.from_df(frame), {"train": ("2018", "2019"), "valid": ("2020", "2020")}
    )
    train = dataset.samples("train", horizon=3)
    assert train.index.get_level_values("datetime").max() == DAYS[DAYS < "2020"][-4]
    assert dataset.get_max_time(dataset.segments) == "2020"


def test_the_latest_end_of_tasks_is_that_of_the_longest_period():
    tasks = [
        {"dataset": {"class": "DatasetH", "kwargs": {"handler": {"kwargs": {"end_time": end}}}}}
        for end in ("2020-06-30", "2020")
    ]
    handlers = [
        task["dataset"]["kwargs"]["handler"] for task in _with_shared_features(tasks, cache=False)
    ]
    assert [handler["kwargs"]["end_time"] for handler in handlers] == ["2020", "2020"]


@pytest.mark.parametrize(
    ("date", "last"),
    [
        ("2020", "2020-12-31 23:59:59.999999999"),
        ("2020-02", "2020-02-29 23:59:59.999999999"),
        ("2020-02-03", "2020-02-03 23:59:59.999999999"),
        ("2020-02-03 15", "2020-02-03 15:59:59.999999999"),
        ("2020-02-03 15:30", "2020-02-03 15:30:59.999999999"),
        (pd.Timestamp("2020-02-03"), "2020-02-03 23:59:59.999999999"),
        (pd.Timestamp("2020-02-03 15:30"), "2020-02-03 15:30"),
        (datetime.date(2020, 2, 3), "2020-02-03 23:59:59.999999999"),
        (np.datetime64("2020-02-03"), "2020-02-03 23:59:59.999999999"),
    ],
)
def test_last_instant_and_last_date(date, last):
    assert last_instant(date) == pd.Timestamp(last)
    day = pd.Timestamp(last).normalize()
    assert last_date(date) == max(day, as_stamp(date))


@pytest.mark.parametrize("date", ["abc", "9999-12-31", "2262", 2020, "2020-01-01 00:00+01:00"])
def test_what_is_not_a_date_is_refused(date):
    with pytest.raises(DataError, match="date"):
        last_instant(date)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1h", "60min"),
        ("2 hours", "120min"),
        ("30T", "30min"),
        ("monthly", "month"),
        ("3d", "3day"),
    ],
)
def test_spellings_of_frequencies(text: str, expected: str) -> None:
    assert frequency(text) == expected
    assert parse_frequency(text) == parse_frequency(expected)


def test_text_of_a_bar_means_only_its_instant() -> None:
    midnight = pd.Timestamp("2024-01-03")
    assert last_instant(bar_text(midnight)) < midnight + pd.Timedelta(seconds=1)
    assert last_instant(midnight) > midnight + pd.Timedelta(hours=23)
