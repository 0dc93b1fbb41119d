"""Parse dates, find their rows in a trading calendar, and name the frequency of its bars."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError, unknown_name_message


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


# -- frequencies -----------------------------------------------------------------------------------

FREQUENCY_UNITS = ("min", "day", "week", "month")
_UNIT_MINUTES = dict.fromkeys(("min", "minute", "minutes", "t"), 1)
_UNIT_MINUTES |= dict.fromkeys(("h", "hour", "hours", "hourly"), 60)
_LONG_UNITS = {"d": "day", "daily": "day", "w": "week", "weekly": "week"}
_LONG_UNITS |= {"m": "month", "mon": "month", "monthly": "month"}


def parse_frequency(freq: str) -> tuple[int, str]:
    """Split a frequency such as "5min", "1h", "day" or "2week" into count and unit.

    The unit is one of `FREQUENCY_UNITS`; hours count as 60 minutes. Raises ConfigError for others.
    """
    count, unit = _split_frequency(freq)
    if unit not in FREQUENCY_UNITS or count < 1:
        raise ConfigError(unknown_name_message("frequency", str(freq), FREQUENCY_UNITS))
    return count, unit


def frequency(freq: str) -> str:
    """Return a frequency as it is spelled in Qlib's file names: `day`, `1min`, `60min`, `week`.

    Unknown units stay as they are. Raises DataError for what is no number and unit.
    """
    count, unit = _split_frequency(freq)
    if not unit:
        raise DataError(f"{freq!r} is not a frequency; expected e.g. 'day', '1min', '30min', '1h'.")
    return unit if count == 1 and unit != "min" else f"{count}{unit}"


def is_frequency(text: Any) -> bool:
    """Whether a text names a frequency with a unit of `FREQUENCY_UNITS`, such as "5min"."""
    return _split_frequency(text)[1] in FREQUENCY_UNITS


def _split_frequency(freq: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d*)\s*([a-z]+)", str(freq).strip().lower())
    if match is None:
        return 0, ""
    count, unit = int(match[1] or 1), match[2]
    minutes = _UNIT_MINUTES.get(unit)
    return (count, _LONG_UNITS.get(unit, unit)) if minutes is None else (count * minutes, "min")


def is_intraday(calendar: pd.DatetimeIndex) -> bool:
    """Whether some date of an ascending calendar has more than one bar."""
    days = calendar.normalize()
    return bool((days[1:] == days[:-1]).any())


def detect_frequency(calendar: pd.DatetimeIndex) -> str:
    """Return the frequency of an ascending calendar of bars.

    Bars within a day have the most frequent distance between them. One bar a date is "day", unless
    ten dates or more are a week or a month apart. Raises DataError for bars of less than a minute.
    """
    distances = np.diff(calendar.as_unit("ns").asi8)
    days = calendar.normalize()
    within_day = np.asarray(days[1:] == days[:-1])
    if within_day.any():
        values, counts = np.unique(distances[within_day], return_counts=True)
        minutes = values[counts.argmax()] / 60e9
        if minutes < 1 or minutes != int(minutes):
            raise DataError(
                f"most bars are {pd.Timedelta(values[counts.argmax()])} apart, which is not a "
                "number of minutes; resample them, or pass the frequency, e.g. freq='1min'."
            )
        return f"{int(minutes)}min"
    if len(calendar) >= 10:
        lowest, median = distances.min() / 86400e9, np.median(distances) / 86400e9
        if lowest >= 3 and 6 <= median <= 8:
            return "week"
        if lowest >= 20 and 27 <= median <= 32:
            return "month"
    return "day"


def bar_text(bar: pd.Timestamp) -> str:
    """Return the time of a bar as text that means only this instant, also as the end of a span.

    A date without a time would include its whole day.
    """
    return f"{bar:%Y-%m-%d %H:%M:%S}"
