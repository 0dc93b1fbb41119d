"""Parse dates and find their rows in a trading calendar."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import pandas as pd

from qtorch.core.errors import DataError


def as_stamp(date: Any) -> pd.Timestamp:
    """Convert a date to a pandas Timestamp without a time zone.

    Raises DataError for anything that is not a date, for a date with a time zone, and for a
    number, which pandas would read as nanoseconds since 1970.
    """
    if isinstance(date, numbers.Number):
        raise DataError(f"{date!r} is a number, not a date; write it as 'YYYY-MM-DD'.")
    try:
        stamp = pd.Timestamp(date).as_unit("ns")
    except (ValueError, TypeError) as error:
        raise DataError(f"{date!r} is not a date: {error}") from error
    if stamp.tz is not None:
        raise DataError(f"the date {date!r} has a time zone; pass a date without one.")
    return stamp


def last_instant(date: Any) -> pd.Timestamp:
    """Return the last nanosecond that an inclusive end date includes.

    As in pandas and Qlib, a partial date as text means its whole period: "2020" the year, "2020-03"
    the month, "2020-03-02 15:30" the minute. A date without a time, also as a Timestamp, includes
    its whole day; any other timestamp is returned unchanged.
    """
    stamp = as_stamp(date)
    period = parse_period(date) if isinstance(date, str) else None
    if period is None and stamp != stamp.normalize():
        return stamp
    next_start = stamp + pd.Timedelta(days=1) if period is None else (period + 1).start_time
    try:
        return next_start.as_unit("ns") - pd.Timedelta(1, "ns")
    except ValueError as error:
        raise DataError(f"the date {date!r} is too late: {error}") from error


def last_date(date: Any) -> pd.Timestamp:
    """Return an inclusive end date as a Timestamp; for a month or year it is the last day of it."""
    return max(as_stamp(date), last_instant(date).normalize())


def parse_period(text: str) -> pd.Period | None:
    """Return the year, month, day or time that a text names, or None if it is none."""
    try:
        return pd.Period(text)
    except ValueError:
        return None


def convert_dates(dates: pd.Series, convert: Callable[[Any], pd.Timestamp]) -> pd.Series:
    """Convert a column of dates with `as_stamp` or `last_date`; missing dates stay missing."""
    return pd.to_datetime(dates.map({date: convert(date) for date in dates.dropna().unique()}))


def first_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """Return the row of the first calendar date on or after `date`, or the calendar's length."""
    return int(calendar.as_unit("ns").searchsorted(as_stamp(date), side="left"))


def end_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """Return the row after the last calendar date on or before `date`; 0 if there is none."""
    return int(calendar.as_unit("ns").searchsorted(last_instant(date), side="right"))


def date_rows(calendar: pd.DatetimeIndex, start: Any = None, end: Any = None) -> slice:
    """Return the calendar rows of the inclusive date range `start..end` (None: unbounded).

    A partial date as `end` includes its whole period, as in `last_instant`.
    """
    first = 0 if start is None else first_row(calendar, start)
    last = len(calendar) if end is None else end_row(calendar, end)
    return slice(first, max(first, last))
