"""A column of dates has one reading, or an error that shows the cells and names the option."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pytest

from qtorch.core.dates import as_stamp, parse_dates, parse_span_date, parse_span_dates
from qtorch.core.errors import ConfigError, DataError


def texts(dates: pd.DatetimeIndex) -> list[str]:
    return [str(date).removesuffix(" 00:00:00") for date in dates]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["01/02/2020", "13/02/2020"], ["2020-02-01", "2020-02-13"]),
        (["01/02/2020", "02/13/2020"], ["2020-01-02", "2020-02-13"]),
        (["13.02.2020"], ["2020-02-13"]),
        (["02/02/2020", "3/3/2020"], ["2020-02-02", "2020-03-03"]),
        (["2020-01-02", "2020-01-13"], ["2020-01-02", "2020-01-13"]),
        (["2020/1/2", "2020.01.13"], ["2020-01-02", "2020-01-13"]),
        (["20200102", "20200113"], ["2020-01-02", "2020-01-13"]),
        (["202001020930", "20200102093100"], ["2020-01-02 09:30:00", "2020-01-02 09:31:00"]),
        (["2020年1月2日"], ["2020-01-02"]),
        (["2 Jan 2020", "January 3, 2020", "04-Feb-2020"], ["2020-01-02", "2020-01-03"]),
        (["13/02/2020 09:30", "1/3/2020 9:31"], ["2020-02-13 09:30:00", "2020-03-01 09:31:00"]),
        (["02/13/2020 1:30 PM"], ["2020-02-13 13:30:00"]),
        ([" 2020-01-02 ", "", None, "NaT"], ["2020-01-02", "NaT", "NaT", "NaT"]),
        ([20200102, 20200103], ["2020-01-02", "2020-01-03"]),
        ([20200102.0, np.nan], ["2020-01-02", "NaT"]),
        ([datetime.date(2020, 1, 2)], ["2020-01-02"]),
        (pd.period_range("2020-01-02", periods=1, freq="D"), ["2020-01-02"]),
        ([datetime.datetime(2020, 1, 2), "2020-01-03"], ["2020-01-02", "2020-01-03"]),
        ([], []),
    ],
)
def test_columns_with_one_reading(cells, expected):
    dates = parse_dates(pd.Series(cells, dtype=None if len(cells) else object))
    assert texts(dates)[: len(expected)] == expected
    assert dates.dtype == np.dtype("datetime64[ns]")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["01/02/2020", "03/02/2020"], r"01/02/2020, 03/02/2020 can be read.*date_format="),
        (["13/02/2020", "02/14/2020"], r"'13/02/2020' \(day/month\) and '02/14/2020' \(month"),
        # Excel converts those cells of a day-first column that it can read month-first.
        (["2020-01-02", "13/01/2020"], r"several formats, such as '2020-01-02' and '13/01/2020'"),
        (["13/02/20"], r"years of two digits.*date_format="),
        (["1577923200"], r"numbers, not dates: 1577923200"),
        ([1577923200000000000], r"numbers, not dates.*date_format='s'"),
        ([0, 1], r"numbers, not dates"),
        ([2020], r"numbers, not dates"),
        ([True], r"'True' is not a date"),
        (["2020-13-01"], r"cannot be parsed: month must be"),
        (["31/31/2020"], r"'31/31/2020' is not a date"),
        (["soon"], r"'soon' is not a date"),
        (["9999-12-31"], r"cannot be stored: Out of bounds"),
        (["2020-01-02T05:00:00Z"], r"the time zone UTC.*timezone="),
        (
            ["2020-01-02 00:00-05:00", "2020-07-02 00:00-04:00"],
            r"summer time.*-04:00.*timezone=",
        ),
        (["2020-01-02 00:00-05:00", "2020-07-02"], r"others, such as '2020-07-02', do not"),
    ],
)
def test_columns_without_one_reading_are_refused_in_one_line(cells, message):
    with pytest.raises(DataError, match=message) as error:
        parse_dates(pd.Series(cells))
    assert "\n" not in str(error.value)


def test_the_option_and_other_columns_decide():
    cells = pd.Series(["01/02/2020", "03/02/2020"])
    assert texts(parse_dates(cells, date_format="%d/%m/%Y")) == ["2020-02-01", "2020-02-03"]
    assert texts(parse_dates(cells, date_format="%m/%d/%Y")) == ["2020-01-02", "2020-03-02"]
    assert texts(parse_dates(cells, context=["28/02/2020"])) == ["2020-02-01", "2020-02-03"]
    assert texts(parse_dates(cells, context=["02/28/2020"])) == ["2020-01-02", "2020-03-02"]
    with pytest.raises(DataError, match="date_format="):
        parse_dates(cells, context=["02/28/2020", "28/02/2020"])
    with pytest.raises(DataError, match=r"not written as '%Y/%m/%d'"):
        parse_dates(cells, date_format="%Y/%m/%d")
    counts = pd.Series([1577941200, 1578027600])
    assert texts(parse_dates(counts, date_format="s"))[0] == "2020-01-02 05:00:00"
    local = parse_dates(counts * 1000, date_format="ms", timezone="America/New_York")
    assert texts(local) == ["2020-01-02", "2020-01-03"]
    with pytest.raises(DataError, match="count s since 1970"):
        parse_dates(cells, date_format="s")


def test_time_zones_are_converted():
    winter_and_summer = pd.Series(["2020-01-02 00:00:00-05:00", "2020-07-02 00:00:00-04:00"])
    dates = parse_dates(winter_and_summer, timezone="America/New_York")
    assert texts(dates) == ["2020-01-02", "2020-07-02"]
    opening = pd.Series(["2020-01-02T14:30:00Z", "2020-07-02T13:30:00Z"])
    dates = parse_dates(opening, timezone="America/New_York")
    assert [f"{date:%H:%M}" for date in dates] == ["09:30", "09:30"]
    utc = pd.DatetimeIndex(["2020-01-02", "2020-01-03"]).tz_localize("UTC")
    assert texts(parse_dates(utc, timezone="UTC")) == ["2020-01-02", "2020-01-03"]
    with pytest.raises(DataError, match=r"midnights in UTC.* 2020-01-01 19:00.*timezone='UTC'"):
        parse_dates(utc, timezone="America/New_York")  # the session before
    assert texts(parse_dates(pd.Series(["2020-01-02"]), timezone="Asia/Tokyo")) == ["2020-01-02"]
    with pytest.raises(ConfigError, match=r"'Mars/City' is not a time zone"):
        parse_dates(utc, timezone="Mars/City")


def test_a_single_date_with_two_readings_is_refused():
    assert as_stamp("13/02/2020") == pd.Timestamp("2020-02-13")
    assert as_stamp("02/13/2020") == pd.Timestamp("2020-02-13")
    with pytest.raises(DataError, match="01/02/2020 can be read as day/month or month/day"):
        as_stamp("01/02/2020")


def test_bounds_of_spans():
    ends = pd.Series(["9999-12-31", "", None, "2020", "2020-02", "2020-02-03"], dtype=object)
    last = pd.Timestamp.max
    expected = [last, last, last, *map(pd.Timestamp, ("2020-12-31", "2020-02-29", "2020-02-03"))]
    assert list(parse_span_dates(ends, is_end=True)) == expected
    assert [parse_span_date(end, is_end=True) for end in ends] == expected
    starts = pd.Series(["0001-01-01", "", "2020", "2020-02"], dtype=object)
    first = pd.Timestamp.min
    expected = [first, first, pd.Timestamp("2020-01-01"), pd.Timestamp("2020-02-01")]
    assert list(parse_span_dates(starts, is_end=False)) == expected
    day_first = pd.Series(["01/02/2020", "31/12/9999"])
    assert list(parse_span_dates(day_first, is_end=True)) == [pd.Timestamp("2020-02-01"), last]
    with pytest.raises(DataError, match="date_format="):
        parse_span_dates(day_first[:1], is_end=True)
