"""Dates that users name, and where they lie on a calendar."""

from __future__ import annotations

import numbers
from typing import Any

import pandas as pd

from qtorch.core.errors import DataError


def as_stamp(date: Any) -> pd.Timestamp:
    """The naive Timestamp of what names a date.

    Raises DataError for what names none: a number too, which pandas takes for nanoseconds since
    1970; and for a date with a time zone.
    """
    if isinstance(date, numbers.Number):
        raise DataError(f"{date!r} is a number, not a date; write it as 'YYYY-MM-DD'.")
    try:
        stamp = pd.Timestamp(date)
    except (ValueError, TypeError) as error:
        raise DataError(f"{date!r} is not a date: {error}") from error
    if stamp.tz is not None:
        raise DataError(f"the date {date!r} carries a time zone; give a naive date.")
    return stamp


def last_instant(date: Any) -> pd.Timestamp:
    """The end of a day for a bare date (so that intraday bars of the last day belong)."""
    stamp = as_stamp(date)
    bare = stamp == stamp.normalize() and not (isinstance(date, str) and ":" in date)
    return stamp + pd.Timedelta(days=1) - pd.Timedelta(1, "ns") if bare else stamp


def first_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """The row of the first calendar date that is not before `date`; its length if none is."""
    return int(calendar.as_unit("ns").searchsorted(as_stamp(date), side="left"))


def end_row(calendar: pd.DatetimeIndex, date: Any) -> int:
    """The row behind the last calendar date that is not after `date`; zero if none is."""
    return int(calendar.as_unit("ns").searchsorted(last_instant(date), side="right"))


def date_rows(calendar: pd.DatetimeIndex, start: Any = None, end: Any = None) -> slice:
    """The rows of a calendar in the inclusive date span `start..end` (None is open).

    A bare date as `end` holds its whole day, so that intraday bars of the last day belong.
    """
    first = 0 if start is None else first_row(calendar, start)
    last = len(calendar) if end is None else end_row(calendar, end)
    return slice(first, max(first, last))
