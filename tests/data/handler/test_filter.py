from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError, ExpressionError
from qtorch.data import ExpressionDFilter, FrameSource, NameDFilter
from qtorch.data.handler.filter import build_filters
from qtorch.data.handler.loader import QlibDataLoader

DATES = pd.bdate_range("2020-01-01", periods=12)
NAMES = ["AA", "AB", "BA"]


@pytest.fixture
def source() -> FrameSource:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    close = np.arange(len(index), dtype=np.float32)
    close[7] = np.nan
    return FrameSource(pd.DataFrame({"close": close}, index))


def rows(source: FrameSource, *pipe, start=None, end=None) -> set[tuple[int, str]]:
    loader = QlibDataLoader(["$close"], filter_pipe=list(pipe), source=source)
    index = loader.load("all", start, end).index
    return {(int(DATES.get_loc(d)), name) for d, name in index}


def all_rows() -> set[tuple[int, str]]:
    return {(d, name) for d in range(12) for name in NAMES}


def test_name_filter_matches_from_the_beginning(source: FrameSource) -> None:
    assert {n for _, n in rows(source, NameDFilter("A"))} == {"AA", "AB"}
    assert {n for _, n in rows(source, NameDFilter(".B$"))} == {"AB"}


def test_a_filter_does_not_change_membership_outside_its_dates(source: FrameSource) -> None:
    passing_rows = rows(source, NameDFilter("A", DATES[3], DATES[5]))
    assert all_rows() - passing_rows == {(d, "BA") for d in (3, 4, 5)}


def test_expression_filter_by_day_treats_missing_values_as_false(source: FrameSource) -> None:
    passing_rows = rows(source, ExpressionDFilter("$close >= 6"))
    expected_rows = {(d, n) for d, n in all_rows() if 3 * d + NAMES.index(n) >= 6} - {(2, "AB")}
    assert passing_rows == expected_rows
    assert (2, "AB") not in rows(source, ExpressionDFilter("$close"))


def test_expression_filter_sees_history_before_the_dates(source: FrameSource) -> None:
    passing_rows = rows(
        source, ExpressionDFilter("Ref($close, 4) >= 0"), start=DATES[4], end=DATES[5]
    )
    assert passing_rows == {(d, n) for d in (4, 5) for n in NAMES}


def test_filters_are_applied_in_order(source: FrameSource) -> None:
    passing_rows = rows(source, NameDFilter("A"), ExpressionDFilter("$close < 9", None, DATES[6]))
    assert {n for _, n in passing_rows} == {"AA", "AB"}
    assert {d for d, _ in passing_rows} == {0, 1, 2, 7, 8, 9, 10, 11}


def test_filters_from_qlibs_dicts_and_configurations(source: FrameSource) -> None:
    old = {
        "filter_type": "ExpressionDFilter",
        "rule_expression": "$close < 9",
        "filter_start_time": None,
        "filter_end_time": "2020-01-09",
        "keep": False,
    }
    new = {"class": "ExpressionDFilter", "kwargs": {"rule_expression": "$close < 9"}}
    first, second = build_filters([old, new])
    assert isinstance(first, ExpressionDFilter)
    assert first.fend_time == "2020-01-09"
    assert second.to_config()["rule_expression"] == "$close < 9"
    market = {
        "market": "all",
        "filter_pipe": [{"class": "NameDFilter", "kwargs": {"name_rule_re": "B"}}],
    }
    frame = QlibDataLoader(["$close"], source=source).load(market)
    assert set(frame.index.get_level_values("instrument")) == {"BA"}


def test_invalid_filters_are_refused(source: FrameSource) -> None:
    with pytest.raises(DataError, match="excludes every instrument on every day"):
        rows(source, NameDFilter("Z"))
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        NameDFilter("(")
    with pytest.raises(ConfigError, match="unknown filter_type 'NameFilter'"):
        build_filters([{"filter_type": "NameFilter"}])
    with pytest.raises(ConfigError, match="must be a list"):
        build_filters({"filter_type": "NameDFilter"})
    with pytest.raises(ExpressionError, match="clos"):
        rows(source, ExpressionDFilter("$close <"))


@pytest.mark.parametrize(
    "rule", ["ChangeInstrument('BA', $close) > 15", "Mask(Mean($close, 2), 'ba') > 15"]
)
def test_a_rule_may_look_at_an_instrument_outside_the_universe(rule: str) -> None:
    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    frame = pd.DataFrame({"close": np.repeat(np.arange(10.0, 22.0), 3)}, index)
    source = FrameSource(frame, universes={"two": ["AA", "AB"]})
    first = 6 if "Mean" not in rule else 7 - (15.5 > 15)
    loader = QlibDataLoader(
        ["$close"], filter_pipe=[NameDFilter("A"), ExpressionDFilter(rule)], source=source
    )
    index = loader.load("two").index
    assert {(int(DATES.get_loc(d)), name) for d, name in index} == {
        (d, name) for d in range(first, 12) for name in ("AA", "AB")
    }
    with pytest.raises(ExpressionError, match="unknown instrument 'XX'"):
        QlibDataLoader(
            ["$close"], filter_pipe=[ExpressionDFilter("Mask($close, 'XX') > 1")], source=source
        ).load("two")


def test_a_filter_of_a_users_own_needs_no_further_bars() -> None:
    class Own(ExpressionDFilter):
        def passes(self, bars):
            return super().passes(bars)

    index = pd.MultiIndex.from_product([DATES, NAMES], names=["datetime", "instrument"])
    source = FrameSource(pd.DataFrame({"close": 1.0}, index), universes={"two": ["AA", "AB"]})
    loader = QlibDataLoader(["Mask($close, 'BA')"], filter_pipe=[Own("$close > 0")], source=source)
    assert len(loader.load("two")) == 24
