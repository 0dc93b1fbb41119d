"""Fractions of a calendar as dates."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch.cli.segments import dates_of, with_dates
from qtorch.core.errors import ConfigError

CALENDAR = pd.bdate_range("2020-01-01", periods=10)


def test_fractions_cut_the_calendar_in_their_order_without_gap_or_overlap():
    found = dates_of({"train": 0.6, "valid": 0.2, "test": 0.2}, CALENDAR)
    assert found == {
        "train": ["2020-01-01", "2020-01-08"],
        "valid": ["2020-01-09", "2020-01-10"],
        "test": ["2020-01-13", "2020-01-14"],
    }


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ({"train": 0.7, "test": 0.4}, "their sum is at most 1"),
        ({"train": 0.0, "test": 0.4}, "each is in"),
        ({"train": 0.5, "test": ["2020-01-01", "2020-01-02"]}, "test is not a fraction"),
        ({"train": 0.5, "valid": 0.01}, "valid=0.01 holds no day"),
    ],
)
def test_what_cannot_be_meant_is_refused(segments, said):
    with pytest.raises(ConfigError, match=said):
        dates_of(segments, CALENDAR)


def test_dates_are_left_alone_and_touch_no_source():
    dates = {"train": ["2020-01-01", "2020-01-05"]}
    task = {"dataset": {"segments": dates, "handler": {"source": {"_target_": "no.such.Source"}}}}
    assert with_dates(task) == task


def test_fractions_without_a_source_ask_for_dates():
    with pytest.raises(ConfigError, match="names no source; give dates"):
        with_dates({"dataset": {"segments": {"train": 0.5}, "handler": {}}})


def test_the_task_given_is_not_changed():
    source = {"_target_": "qtorch.data.source.synthetic.SyntheticSource", "num_instruments": 2}
    task = {"dataset": {"segments": {"train": 0.5}, "handler": {"source": source}}}
    found = with_dates(task)
    assert task["dataset"]["segments"] == {"train": 0.5}
    assert found["dataset"]["segments"]["train"][0] == "2015-01-01"
