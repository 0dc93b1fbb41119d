"""Parse dates and find their rows in a trading calendar."""

from __future__ import annotations

import numbers
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
        stamp = pd.Timestamp(date)
    except (ValueError, TypeError) as error:
        raise DataError(f"{date!r} is not a date: {error}") from error
    if stamp.tz is not None:
        raise DataError(f"the date {date!r} has a time zone; pass a date without one.")
    return stamp


def last_instant(date: Any) -> pd.Timestamp:
    """Return the last nanosecond of the day for a bare date, any other timestamp unchanged.

    A bare end date thus includes the intraday bars of its day.
    """
    stamp = as_stamp(date)
    is_bare_date = stamp == stamp.normalize() and not (isinstance(date, str) and ":" in date)
    return stamp + pd.Timedelta(days=1) - pd.Timedelta(1, "ns") if is_bare_date else stamp


def first_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """Return the row of the first calendar date on or after `date`, or the calendar's length."""
    return int(calendar.as_unit("ns").searchsorted(as_stamp(date), side="left"))


def end_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """Return the row after the last calendar date on or before `date`; 0 if there is none."""
    return int(calendar.as_unit("ns").searchsorted(last_instant(date), side="right"))


def date_rows(calendar: pd.DatetimeIndex, start: Any = None, end: Any = None) -> slice:
    """Return the calendar rows of the inclusive date range `start..end` (None: unbounded).

    A bare date as `end` includes the intraday bars of its day.
    """
    first = 0 if start is None else first_row(calendar, start)
    last = len(calendar) if end is None else end_row(calendar, end)
    return slice(first, max(first, last))
