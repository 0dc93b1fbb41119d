"""Tests of the conversion of fractional segments to dates."""

from __future__ import annotations

import pandas as pd
import pytest
from omegaconf import OmegaConf

from qtorch.cli.compose import compose_settings
from qtorch.core.dates import date_rows
from qtorch.core.errors import ConfigError
from qtorch.data.dataset.samples import check_segments
from qtorch.trainer.run import complete_task
from qtorch.trainer.segments import resolve_segments, segment_dates

CALENDAR = pd.bdate_range("2020-01-01", periods=10)


def test_fractions_split_the_calendar_without_gap_or_overlap():
    dates = segment_dates({"train": 0.6, "valid": 0.2, "test": 0.2}, CALENDAR)
    assert dates == {
        "train": ["2020-01-01", "2020-01-08"],
        "valid": ["2020-01-09", "2020-01-10"],
        "test": ["2020-01-13", "2020-01-14"],
    }


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ({"train": 0.7, "test": 0.4}, "their sum at most 1"),
        ({"train": 0.0, "test": 0.4}, "each must be in"),
        ({"train": 0.5, "test": ["2020-01-01", "2020-01-02"]}, "test is not a fraction"),
        ({"train": 0.5, "valid": 0.01}, "valid=0.01 contains no day"),
    ],
)
def test_invalid_segments_are_rejected(segments, message):
    with pytest.raises(ConfigError, match=message):
        segment_dates(segments, CALENDAR)


def test_dates_are_unchanged_and_do_not_read_the_source():
    dates = {"train": ["2020-01-01", "2020-01-05"]}
    task = {"dataset": {"segments": dates, "handler": {"source": {"_target_": "no.such.Source"}}}}
    assert resolve_segments(task) == task


def test_fractions_without_a_source_are_rejected():
    with pytest.raises(ConfigError, match="has no source; use dates"):
        resolve_segments({"dataset": {"segments": {"train": 0.5}, "handler": {}}})


def test_the_original_task_is_not_modified():
    source = {"_target_": "qtorch.data.source.synthetic.SyntheticSource", "num_instruments": 2}
    task = {"dataset": {"segments": {"train": 0.5}, "handler": {"source": source}}}
    new_task = resolve_segments(task)
    assert task["dataset"]["segments"] == {"train": 0.5}
    assert new_task["dataset"]["segments"]["train"][0] == "2015-01-01"


def test_a_task_of_python_may_have_fractions_too():
    segments = {"train": 0.5, "test": 0.5}
    source = {"_target_": "qtorch.data.source.synthetic.SyntheticSource", "num_instruments": 2}
    task = {"model": "m", "dataset": {"segments": segments, "handler": {"source": source}}}
    for form in (task, OmegaConf.create(task)):
        spans = complete_task(form)["dataset"]["segments"]
        assert spans["train"][0] == "2015-01-01"
        assert spans["train"][1] < spans["test"][0]


def test_part_of_a_reference_is_set_at_its_source():
    with pytest.raises(
        ConfigError, match=r"dataset.segments is \$\{segments\}: set segments.train"
    ):
        compose_settings("train", ["dataset.segments.train=[2015-01-01,2017-12-31]"])


def test_a_boundary_may_be_inside_a_day():
    times = [pd.Timedelta(minutes=m) for m in (600, 660, 720, 780)]
    days = pd.bdate_range("2020-01-01", periods=5)
    calendar = pd.DatetimeIndex([d + t for d in days for t in times])
    dates = segment_dates({"train": 0.5, "test": 0.5}, calendar)
    assert dates == {
        "train": ["2020-01-01 10:00:00", "2020-01-03 11:00:00"],
        "test": ["2020-01-03 12:00:00", "2020-01-07 13:00:00"],
    }
    check_segments(dates)
    with pytest.raises(ConfigError, match="contains no bar: the calendar has 20 bars"):
        segment_dates({"train": 0.9, "test": 0.01}, calendar)


def test_bars_around_the_clock_have_times_at_midnight_too():
    calendar = pd.date_range("2020-01-01", periods=48, freq="h")
    dates = segment_dates({"train": 25 / 48, "test": 23 / 48}, calendar)
    assert dates["train"][1] == "2020-01-02 00:00:00"
    check_segments(dates)
    assert date_rows(calendar, *dates["train"]) == slice(0, 25)
    assert date_rows(calendar, *dates["test"]) == slice(25, 48)
