"""TimeAdjuster: align, count, truncate and shift dates on a trading calendar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from qtorch.core.configured import plain_value
from qtorch.core.dates import bar_text, end_row, first_row, is_intraday
from qtorch.core.errors import ConfigError, DataError, unknown_name_message

if TYPE_CHECKING:
    from qtorch.data.source.base import Source

Span = tuple[pd.Timestamp | None, pd.Timestamp | None]


class CalendarEndError(DataError, KeyError):
    """A date was shifted beyond the calendar's end (a KeyError, as in Qlib)."""

    __str__ = Exception.__str__


class TimeAdjuster:
    """Moves dates along a trading calendar of bars. Corresponds to qlib/workflow/task/utils.py.

    Steps are rows of the calendar: trading days for daily bars, bars for others.

    The calendar is `calendar` (dates), else that of `source` (a Source, its configuration or a
    folder in Qlib's layout), else that of `qtorch.init(provider_uri=...)`. `freq` is the frequency
    of its bars; None is that of the source. `future` adds future bars if the source has them
    (`<freq>_future.txt`). None as a date means unbounded.

    Differences from Qlib: a date before the first or after the last day is an error, while Qlib
    returns the other end of the calendar; spans may be lists as well as tuples.
    """

    SHIFT_SD = "sliding"
    SHIFT_EX = "expanding"

    def __init__(
        self,
        future: bool = True,
        end_time: Any = None,
        *,
        calendar: Sequence[Any] | pd.DatetimeIndex | None = None,
        source: Any = None,
        freq: str | None = None,
    ) -> None:
        if calendar is None:
            dates = _load_calendar(source, freq, future)
        else:
            dates = pd.DatetimeIndex(list(calendar)).as_unit("ns")
        if not len(dates):
            raise DataError("the calendar is empty.")
        if not (dates.is_monotonic_increasing and dates.is_unique):
            raise DataError("the calendar's dates must be increasing and unique.")
        self._all = dates
        self.cals = dates
        self.is_intraday = is_intraday(dates)
        self.set_end_time(end_time)

    def set_end_time(self, end_time: Any = None) -> None:
        """Truncate the calendar after a date; None restores the full calendar."""
        stop = None if end_time is None else end_row(self._all, end_time)
        self.cals = self._all[:stop]
        if not len(self.cals):
            raise DataError(f"no trading day up to {end_time}; the first is {self._all[0]:%F}.")

    def get(self, idx: int | None) -> pd.Timestamp | None:
        """Return the date of a calendar row; None for None and for rows after the end."""
        if idx is None or idx >= len(self.cals):
            return None
        if idx < 0:
            raise DataError(
                f"there is no date {-idx} trading days before the calendar's first "
                f"({self.cals[0]:%Y-%m-%d}); use a later start."
            )
        return self.cals[idx]

    def to_text(self, segments: Mapping[str, Any]) -> dict[str, list[str | None]]:
        """Convert segments to plain data with dates as text, as in a task (Qlib has Timestamps).

        The text has the time if the calendar has several bars a day: a date alone, as an end, would
        include the whole day.
        """
        return {name: [self._date_text(date) for date in span] for name, span in segments.items()}

    def _date_text(self, date: Any) -> Any:
        has_time = self.is_intraday and isinstance(date, pd.Timestamp)
        return bar_text(date) if has_time else plain_value(date)

    def max(self) -> pd.Timestamp:
        """Return the last date of the calendar."""
        return self.cals[-1]

    def align_idx(self, time_point: Any, tp_type: str = "start") -> int | None:
        """Return the row of the first date on or after ("start") or the last on or before ("end").

        "start" may return the length of the calendar, "end" may return -1.
        """
        if tp_type not in ("start", "end"):
            raise ConfigError(unknown_name_message("tp_type", str(tp_type), ("start", "end")))
        if time_point is None:
            return None
        if tp_type == "start":
            return first_row(self.cals, time_point)
        return end_row(self.cals, time_point) - 1

    def cal_interval(self, time_point_A: Any, time_point_B: Any) -> int:
        """Return the number of trading days from B to A (negative if A is before B)."""
        a, b = self.align_idx(time_point_A), self.align_idx(time_point_B)
        if a is None or b is None:
            raise ConfigError("cannot count the trading days between dates if one of them is None.")
        return a - b

    def align_time(self, time_point: Any, tp_type: str = "start") -> pd.Timestamp | None:
        """Return the first trading day on or after ("start") or the last on or before ("end")."""
        row = self.align_idx(time_point, tp_type)
        if row is None:
            return None
        if not 0 <= row < len(self.cals):
            position = "before" if row < 0 else "after"
            raise DataError(
                f"{time_point} is {position} the calendar, which covers "
                f"{self.cals[0]:%Y-%m-%d}..{self.cals[-1]:%Y-%m-%d}."
            )
        return self.cals[row]

    def align_seg(self, segment: Any) -> Any:
        """Align the dates of a span, or of a mapping of spans, to trading days."""
        if isinstance(segment, Mapping):
            return {name: self.align_seg(part) for name, part in segment.items()}
        start, end = _split_segment(segment)
        return self.align_time(start, "start"), self.align_time(end, "end")

    def truncate(self, segment: Any, test_start: Any, days: int) -> Span:
        """Truncate a span to end at least `days` trading days before `test_start`.

        A label that looks `days` rows ahead is then known at the close of the first test day.
        Raises ConfigError if nothing of the span is left.
        """
        start, end = _split_segment(segment)
        limit = self.align_idx(test_start)
        assert limit is not None, "a test segment has a start"
        limit -= days
        first, last = self.align_idx(start, "start"), self.align_idx(end, "end")
        last = limit if last is None else min(last, limit)
        if last < (first or 0):
            raise ConfigError(
                f"the segment {start}..{end} has no day left when it is truncated {days} trading "
                f"days before the test starts ({test_start}); start it earlier or the test later."
            )
        return self.get(first), self.get(last)

    def shift(self, seg: Any, step: int, rtype: str = SHIFT_SD) -> Span:
        """Shift a span by `step` trading days: both dates, or only the end ("expanding").

        An end after the calendar becomes None. Raises CalendarEndError (a KeyError) if the start
        is after the calendar.
        """
        if rtype not in (self.SHIFT_SD, self.SHIFT_EX):
            raise ConfigError(
                unknown_name_message("rtype", str(rtype), (self.SHIFT_SD, self.SHIFT_EX))
            )
        start, end = _split_segment(seg)
        first, last = self.align_idx(start, "start"), self.align_idx(end, "end")
        last = None if last is None else last + step
        if rtype == self.SHIFT_SD and first is not None:
            first += step
        if first is not None and first >= len(self.cals):
            raise CalendarEndError(
                f"{start}..{end} shifted by {step} trading days starts after the calendar's end "
                f"({self.cals[-1]:%Y-%m-%d})."
            )
        return self.get(first), self.get(last)


def _load_calendar(source: Any, freq: str | None, future: bool) -> pd.DatetimeIndex:
    from qtorch.data.source.frame import build_source, default_source

    calendar_source: Source = default_source() if source is None else build_source(source)
    freq = calendar_source.resolve_frequency(freq)
    if future:
        try:
            return calendar_source.read_calendar(f"{freq}_future")
        except DataError:  # most data has no future calendar
            return calendar_source.calendar(freq=freq)
    return calendar_source.calendar(freq=freq)


def _split_segment(segment: Any) -> tuple[Any, Any]:
    if isinstance(segment, list | tuple) and len(segment) == 2:
        return segment[0], segment[1]
    raise ConfigError(f"a segment must be two dates (start, end); got {segment!r:.80}.")
