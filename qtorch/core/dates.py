"""Parse dates by one rule, find their rows in a calendar, and name the frequency of its bars."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.core.tables import MISSING_VALUES

UNITS = ("s", "ms", "us", "ns")
"""Values of `date_format` for numbers that count the time since 1970."""

# A time of day follows the date in the last group of the patterns.
_YEAR_FIRST = re.compile(r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?((?:[T ].*)?)")
_YEAR_MONTH = re.compile(r"(\d{4})[-/.年](\d{1,2})月?")
_COMPACT = re.compile(r"(\d{4})(\d{2})(\d{2})((?:[T ].*)?)")
_NUMBER = re.compile(r"(\d{4})(\d{2})(\d{2})(?:(\d{2})(\d{2})(\d{2})?)?")
_YEAR_LAST = re.compile(r"(\d{1,2})[-/. ](\d{1,2})[-/. ](\d{4})((?:[T ,].*)?)")
_SHORT_YEAR = re.compile(r"\d{1,2}[-/. ]\d{1,2}[-/. ]\d{2}(?:[T ,].*)?")
_MONTH_NAME = re.compile(
    r"(?<![a-z])(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*(?![a-z])", re.IGNORECASE
)
_OFFSET = re.compile(r"(?:\d:\d{2}|T\d{4,6}).*?(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$")
_PARTIAL = re.compile(r"\d{4}(?:-?[qQ][1-4]|[-/.年]\d{1,2}月?)?|[a-zA-Z]{3,9}\.? \d{4}")
_MISSING = frozenset({*MISSING_VALUES, "NaT"})
_FORMAT_HINT = "write them as YYYY-MM-DD, or set date_format=, such as '%d/%m/%Y' or '%m/%d/%Y'"


# -- one date --------------------------------------------------------------------------------------


def as_stamp(date: Any) -> pd.Timestamp:
    """Convert a date to a pandas Timestamp without a time zone.

    Raises DataError for anything that is not a date, for a date with a time zone, for a number,
    which pandas would read as nanoseconds since 1970, and for a text such as 01/02/2020, which has
    two readings.
    """
    stamp = _as_any_stamp(date)
    try:
        return stamp.as_unit("ns")
    except ValueError as error:
        raise DataError(f"{date!r} is not a date that can be stored: {error}") from error


def _as_any_stamp(date: Any) -> pd.Timestamp:
    """Convert a date like `as_stamp`, but allow years outside 1677 to 2262."""
    if isinstance(date, numbers.Number):
        raise DataError(f"{date!r} is a number, not a date; write it as 'YYYY-MM-DD'.")
    try:
        stamp = pd.Timestamp(_iso_text(date) if isinstance(date, str) else date)
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{date!r} is not a date: {error}") from error
    if pd.isna(stamp):
        raise DataError(f"{date!r} is not a date.")
    if stamp.tz is not None:
        raise DataError(f"the date {date!r} has a time zone; pass a date without one.")
    return stamp


def _iso_text(text: str) -> str:
    """Put the year first in a text whose order is known; return other texts unchanged."""
    text = text.strip()
    if _PARTIAL.fullmatch(text):
        return text.replace("年", "-").removesuffix("月")
    return text if _find_kind(text) is None else _put_year_first([text])[0]


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
        return pd.Period(_iso_text(text))
    except ValueError:
        return None


def parse_span_date(date: Any, *, is_end: bool) -> pd.Timestamp:
    """Convert the start or the end of a membership span to a Timestamp.

    A missing date, and a year outside 1678 to 2261 such as that of 9999-12-31, is an open end: the
    first or last Timestamp. The end of a partial date is the last day of its month or year.
    """
    if date.strip() in _MISSING if isinstance(date, str) else pd.isna(date):
        return pd.Timestamp.max if is_end else pd.Timestamp.min
    stamp = _as_any_stamp(date)
    if stamp.year >= pd.Timestamp.max.year:
        return pd.Timestamp.max
    if stamp.year <= pd.Timestamp.min.year:
        return pd.Timestamp.min
    return last_date(date) if is_end and isinstance(date, str) else stamp.as_unit("ns")


# -- a column of dates -----------------------------------------------------------------------------


def parse_dates(
    values: Any,
    *,
    date_format: str | None = None,
    timezone: str | None = None,
    context: Iterable[str] = (),
) -> pd.DatetimeIndex:
    """Parse a column of dates by one format; return datetime64[ns] without a time zone.

    The format is inferred from the whole column: the year first (2020-01-31, 2020/1/31, 20200131,
    also with a time), the name of a month, or one of day/month/year and month/day/year. Where no
    cell of the column tells day and month apart, the texts of `context` do, e.g. those of another
    column. Numbers are dates if they are written as 20200131, 202001310930 or 20200131093000.
    `date_format`: a format of `strptime`, or s, ms, us, ns for numbers that count since 1970.
    `timezone`: the zone to which dates with a time zone are converted; other dates are local.

    Missing cells become NaT. Raises DataError for several formats in one column, for days and
    months that cannot be told apart, for two-digit years, for other numbers, and for time zones
    without `timezone`; ConfigError for an unknown time zone.
    """
    if date_format in UNITS:
        dates = _parse_counts(values, date_format, timezone)
    else:
        dates = _parse_column(pd.Series(values), date_format, timezone, context)
    dates = _remove_zone(dates, timezone)
    try:
        return pd.DatetimeIndex(np.asarray(dates.as_unit("ns")))
    except ValueError as error:
        raise DataError(f"the dates cannot be stored: {error}") from error


def parse_span_dates(
    values: pd.Series,
    *,
    is_end: bool,
    date_format: str | None = None,
    context: Iterable[str] = (),
) -> pd.Series:
    """Parse a column of span starts or ends by one format; open and partial dates are allowed.

    See `parse_span_date` for open and partial dates, and `parse_dates` for the formats and errors.
    """
    codes, uniques = pd.factorize(values.map(_cell_text))
    full_texts = [t for t in uniques if t not in _MISSING and not _PARTIAL.fullmatch(t)]
    if date_format is not None:
        full_texts = [text for text in uniques if text not in _MISSING]
    full_dates = _parse_texts(full_texts, date_format, None, context)
    dates = dict(zip(full_texts, full_dates, strict=True))
    bounds = [parse_span_date(dates.get(text, text), is_end=is_end) for text in uniques]
    return pd.Series([bounds[code] for code in codes], values.index, dtype="datetime64[ns]")


def date_texts(values: pd.Series) -> list[str]:
    """Return the distinct texts of a column of dates, as a `context` for another column."""
    if not (pd.api.types.is_object_dtype(values) or pd.api.types.is_string_dtype(values)):
        return []
    return [value.strip() for value in values.dropna().unique() if isinstance(value, str)]


def _parse_column(
    values: pd.Series, date_format: str | None, timezone: str | None, context: Iterable[str]
) -> pd.DatetimeIndex:
    """Parse a column of any type; the result may have a time zone and any resolution."""
    if pd.api.types.is_datetime64_any_dtype(values):
        return pd.DatetimeIndex(values)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "period":
        return pd.PeriodIndex(values).to_timestamp()
    if kind in ("datetime", "datetime64", "date"):
        return _parse_with_pandas(list(values), timezone)
    codes, uniques = pd.factorize(values)
    texts = [_cell_text(value) for value in np.asarray(uniques, dtype=object).tolist()]
    dates = _parse_texts(texts, date_format, timezone, context)
    # The code of a missing cell is -1, which is the last row.
    return pd.DatetimeIndex(dates.insert(len(dates), pd.NaT)[codes])


def _cell_text(value: Any) -> str:
    """Return a cell of a column of dates as text; a missing one is empty."""
    if isinstance(value, str):
        return value.strip()
    if pd.isna(value):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and float(value).is_integer():
        return str(int(value))
    return str(value)


def _parse_counts(values: Any, unit: str, timezone: str | None) -> pd.DatetimeIndex:
    """Parse numbers, or texts of numbers, that count units of time since 1970 in UTC.

    The result is in UTC; without a time zone to convert it to, UTC counts as local.
    """
    try:
        counts: Any = pd.to_numeric(pd.Series(values))
        convert: Any = pd.to_datetime  # the stubs do not allow a unit in a variable
        dates = convert(counts, unit=unit, utc=timezone is not None)
        return pd.DatetimeIndex(dates)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"date_format={unit!r} needs numbers that count {unit} since 1970: {error}"
        ) from error


def _parse_texts(
    texts: Sequence[str], date_format: str | None, timezone: str | None, context: Iterable[str]
) -> pd.DatetimeIndex:
    """Parse distinct texts; missing ones become NaT."""
    if date_format is None:
        with suppress(ValueError):  # the usual case, which pandas parses fast
            return pd.DatetimeIndex(pd.to_datetime(pd.Index(texts, dtype=str), format="%Y-%m-%d"))
    known_texts = [text for text in texts if text not in _MISSING]
    if date_format is not None:
        try:
            dates = pd.DatetimeIndex(pd.to_datetime(known_texts, format=date_format))
        except ValueError as error:
            raise DataError(
                f"the dates are not written as {date_format!r}: {str(error).partition('. You ')[0]}"
            ) from error
    else:
        dates = _parse_with_pandas(_put_year_first(known_texts, context), timezone)
    row_numbers = iter(range(len(dates)))
    rows = [-1 if text in _MISSING else next(row_numbers) for text in texts]
    return pd.DatetimeIndex(dates.insert(len(dates), pd.NaT)[rows])


def _put_year_first(texts: Sequence[str], context: Iterable[str] = ()) -> list[str]:
    """Rewrite the texts of one column as ISO dates; texts with names of months are kept.

    Raises DataError for several kinds of dates, and for what is none.
    """
    kind = _find_column_kind(texts)
    if kind == "month name":
        return list(texts)
    if kind == "year last":
        matches = [match for match in map(_YEAR_LAST.fullmatch, texts) if match]
        parts = [match.groups() for match in matches]
        if _is_day_first(texts, context):
            return [_join_date(year, month, day, time) for day, month, year, time in parts]
        return [_join_date(year, month, day, time) for month, day, year, time in parts]
    return [_join_date(*parts) for parts in map(_match_year_first, texts) if parts is not None]


def _find_column_kind(texts: Sequence[str]) -> str:
    """Return how all dates of a column are written; raise DataError if it is not in one way."""
    kinds: dict[str, str] = {}
    for text in texts:
        kind = _find_kind(text)
        if kind is None and text.isdecimal():
            raise DataError(
                f"the column contains numbers, not dates: {text}. Expected 20200131, or "
                "date_format='s', 'ms', 'us' or 'ns' for numbers that count since 1970."
            )
        if kind is None:
            raise DataError(f"the dates cannot be parsed: {text!r} is not a date; {_FORMAT_HINT}.")
        kinds.setdefault(kind, text)
    if len(kinds) > 1:
        cells = " and ".join(repr(text) for text in list(kinds.values())[:2])
        raise DataError(
            f"the dates have several formats, such as {cells}, so some of them may have been "
            f"converted wrongly before; {_FORMAT_HINT}."
        )
    if "short year" in kinds:
        raise DataError(
            f"the dates have years of two digits, such as {kinds['short year']!r}; write them as "
            "YYYY-MM-DD, or set date_format=, such as '%d/%m/%y'."
        )
    return next(iter(kinds), "year first")


def _find_kind(text: str) -> str | None:
    """Return how a date is written; None if it is no full date, or written in another way."""
    if _match_year_first(text) is not None:
        return "year first"
    if _YEAR_LAST.fullmatch(text):
        return "year last"
    if _SHORT_YEAR.fullmatch(text):
        return "short year"
    return "month name" if _MONTH_NAME.search(text) else None


def _match_year_first(text: str) -> tuple[str, str, str, str] | None:
    match = _YEAR_FIRST.fullmatch(text) or _COMPACT.fullmatch(text)
    if match is not None:
        year, month, day, time = match.groups()
        return year, month, day, time
    match = _NUMBER.fullmatch(text.removesuffix(".0"))
    if match is not None:
        year, month, day, hour, minute, second = match.groups()
        return year, month, day, f" {hour}:{minute}:{second or '00'}" if hour else ""
    match = _YEAR_MONTH.fullmatch(text)
    return None if match is None else (match.group(1), match.group(2), "01", "")


def _join_date(year: str, month: str, day: str, time: str) -> str:
    return f"{year}-{month:0>2}-{day:0>2}{time.replace(',', ' ', 1)}"


def _is_day_first(texts: Iterable[str], context: Iterable[str]) -> bool:
    """Return whether the first number of every text is the day, else the month.

    Raises DataError if both occur, or if neither these texts nor the context decide it.
    """
    day_first, month_first, either = _find_orders(texts)
    if day_first and month_first:
        raise DataError(
            f"the dates {day_first!r} (day/month) and {month_first!r} (month/day) are in one "
            f"column; {_FORMAT_HINT}."
        )
    if not (day_first or month_first) and either:
        examples = ", ".join(either[:3])
        day_first, month_first, _ = _find_orders(context)
        if bool(day_first) == bool(month_first):
            raise DataError(
                f"the dates {examples} can be read as day/month or month/day, and no other cell "
                f"decides it; {_FORMAT_HINT}."
            )
    return not month_first


def _find_orders(texts: Iterable[str]) -> tuple[str, str, list[str]]:
    """Return a text with the day first, one with the month first, and those that may be either."""
    day_first, month_first, either = "", "", []
    for text in texts:
        match = _YEAR_LAST.fullmatch(text)
        if match is None:
            continue
        first, second = int(match.group(1)), int(match.group(2))
        if first > 12 >= second:
            day_first = day_first or text
        elif second > 12 >= first:
            month_first = month_first or text
        elif first > 12:
            raise DataError(f"the dates cannot be parsed: {text!r} is not a date.")
        elif first != second:
            either.append(text)
    return day_first, month_first, either


def _parse_with_pandas(dates: Sequence[Any], timezone: str | None) -> pd.DatetimeIndex:
    """Parse texts that pandas reads in one way only, or dates that are objects of Python."""
    zones = {_find_zone(date) for date in dates if not pd.isna(date)}
    if None in zones and len(zones) > 1:
        plain = next(date for date in dates if not pd.isna(date) and _find_zone(date) is None)
        raise DataError(f"some dates have a time zone, but others, such as {str(plain)!r}, do not.")
    if len(zones) > 1 and timezone is None:
        offsets = ", ".join(sorted(map(str, zones)))
        zone = f"several time zones, or one with summer time: their offsets are {offsets}"
        raise DataError(_time_zone_message(zone))
    options: dict[str, Any] = {"utc": True} if len(zones) > 1 else {}
    try:
        index = pd.to_datetime(list(dates), format="ISO8601", **options)
    except ValueError:
        try:
            index = pd.to_datetime(list(dates), format="mixed", **options)
        except (ValueError, TypeError) as error:
            raise DataError(f"the dates cannot be parsed: {error}") from error
    return pd.DatetimeIndex(index)


def _find_zone(date: Any) -> str | None:
    """Return the time zone of a text or of an object, None if it has none."""
    if isinstance(date, str):
        match = _OFFSET.search(date)
        return None if match is None else match.group(1)
    zone = getattr(date, "tzinfo", None)
    return None if zone is None else str(zone)


def _remove_zone(dates: pd.DatetimeIndex, timezone: str | None) -> pd.DatetimeIndex:
    """Convert dates with a time zone to local dates of `timezone`."""
    if dates.tz is None:
        return dates
    if timezone is None:
        raise DataError(_time_zone_message(f"the time zone {dates.tz}"))
    try:
        local_dates = dates.tz_convert(timezone).tz_localize(None)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"timezone={timezone!r} is not a time zone; expected a name such as 'America/New_York' "
            "or 'Asia/Shanghai'."
        ) from error
    is_midnight = (dates == dates.normalize()) | dates.isna()
    is_local_midnight = local_dates == local_dates.normalize()
    if len(dates) and is_midnight.all() and not is_local_midnight.any() and not dates.isna().all():
        raise DataError(
            f"the dates are midnights in {dates.tz}, which {timezone} has at another time of day, "
            f"the first at {local_dates.dropna()[0]}; dates of sessions need timezone='{dates.tz}'."
        )
    return local_dates


def _time_zone_message(zone: str) -> str:
    return (
        f"the dates have {zone}; qtorch expects naive local session dates. Set timezone= to the "
        "zone of the exchange, such as 'America/New_York' (TableSource, FrameSource, "
        "StaticDataLoader; data.timezone=... on the command line), or convert them first with "
        "df.index.tz_convert(zone).tz_localize(None)."
    )


# -- rows of a calendar ----------------------------------------------------------------------------


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


def name_bars(bars: str | pd.Index) -> str:
    """Name the bars of a frequency, or of dates, for texts and axes.

    "trading days", "weeks", "months", "bars of 30min"; "bars" if their frequency is not known.
    """
    if not isinstance(bars, str):
        try:
            bars = detect_frequency(pd.DatetimeIndex(bars).unique().sort_values())
        except DataError:
            return "bars"
    count, unit = parse_frequency(bars)
    words = {"day": "trading days", "week": "weeks", "month": "months"}
    return words[unit] if count == 1 and unit in words else f"bars of {frequency(bars)}"


def bar_text(bar: pd.Timestamp) -> str:
    """Return the time of a bar as text that means only this instant, also as the end of a span.

    A date without a time would include its whole day.
    """
    return f"{bar:%Y-%m-%d %H:%M:%S}"
