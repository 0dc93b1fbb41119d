"""Dates on a trading calendar: aligned, counted, truncated and shifted by trading days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from qtorch.core.dates import end_row, first_row
from qtorch.core.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from qtorch.data.source.base import Source

Span = tuple[pd.Timestamp | None, pd.Timestamp | None]


class CalendarEndError(DataError, KeyError):
    """A date was moved beyond the calendar's end (a KeyError, as in Qlib)."""

    __str__ = Exception.__str__


class TimeAdjuster:
    """Moves dates along a calendar. Answers to qlib/workflow/task/utils.py.

    The calendar: `calendar` (dates), else that of `source` (a Source, its configuration or a
    folder in Qlib's layout), else of `qtorch.init(provider_uri=...)`. `future` adds the trading
    days to come where the source holds them (`<freq>_future.txt`). None as a date is open.

    Differences: a date before the first day or after the last is an error where Qlib answers with
    the calendar's other end; lists serve as spans as well as tuples.
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
        freq: str = "day",
    ) -> None:
        if calendar is None:
            dates = _calendar_of(source, freq, future)
        else:
            dates = pd.DatetimeIndex(list(calendar)).as_unit("ns")
        if not len(dates):
            raise DataError("the calendar holds no date.")
        if not (dates.is_monotonic_increasing and dates.is_unique):
            raise DataError("the calendar's dates must ascend and stand once each.")
        self._all = dates
        self.cals = dates
        self.set_end_time(end_time)

    def set_end_time(self, end_time: Any = None) -> None:
        """End the calendar at a date; None is its own end."""
        stop = None if end_time is None else end_row(self._all, end_time)
        self.cals = self._all[:stop]
        if not len(self.cals):
            raise DataError(f"no trading day up to {end_time}; the first is {self._all[0]:%F}.")

    def get(self, idx: int | None) -> pd.Timestamp | None:
        """The date of a calendar row; None for None and for rows behind the end."""
        if idx is None or idx >= len(self.cals):
            return None
        if idx < 0:
            raise DataError(
                f"{-idx} trading days before the calendar's first ({self.cals[0]:%Y-%m-%d}) there "
                "is no date; begin later."
            )
        return self.cals[idx]

    def max(self) -> pd.Timestamp:
        """The last date."""
        return self.cals[-1]

    def align_idx(self, time_point: Any, tp_type: str = "start") -> int | None:
        """The row of a date: "start" the first that is not before it, "end" the last not after it.

        The one may lie behind the last row, the other may be -1.
        """
        if tp_type not in ("start", "end"):
            raise ConfigError(unknown_name("tp_type", str(tp_type), ("start", "end")))
        if time_point is None:
            return None
        if tp_type == "start":
            return first_row(self.cals, time_point)
        return end_row(self.cals, time_point) - 1

    def cal_interval(self, time_point_A: Any, time_point_B: Any) -> int:
        """Trading days from B to A."""
        a, b = self.align_idx(time_point_A), self.align_idx(time_point_B)
        if a is None or b is None:
            raise ConfigError("the days between two dates cannot be counted where one is open.")
        return a - b

    def align_time(self, time_point: Any, tp_type: str = "start") -> pd.Timestamp | None:
        """The trading day of a date: the first not before it, or the last not after it."""
        row = self.align_idx(time_point, tp_type)
        if row is None:
            return None
        if not 0 <= row < len(self.cals):
            side = "before its first" if row < 0 else "after its last"
            raise DataError(
                f"{time_point} is no day of the calendar, it lies {side}: it holds "
                f"{self.cals[0]:%Y-%m-%d}..{self.cals[-1]:%Y-%m-%d}."
            )
        return self.cals[row]

    def align_seg(self, segment: Any) -> Any:
        """A span, or a mapping of spans, by trading days."""
        if isinstance(segment, Mapping):
            return {name: self.align_seg(part) for name, part in segment.items()}
        start, end = _pair(segment)
        return self.align_time(start, "start"), self.align_time(end, "end")

    def truncate(self, segment: Any, test_start: Any, days: int) -> Span:
        """A span that ends `days` trading days before `test_start`, or sooner.

        A label that looks `days` rows ahead is then known when the first test day closes. Raises
        ConfigError where nothing of the span is left.
        """
        start, end = _pair(segment)
        limit = self.align_idx(test_start)
        assert limit is not None, "a test segment has a start"
        limit -= days
        first, last = self.align_idx(start, "start"), self.align_idx(end, "end")
        last = limit if last is None else min(last, limit)
        if last < (first or 0):
            raise ConfigError(
                f"the segment {start}..{end} has no day left when it is cut {days} trading days "
                f"before the test begins ({test_start}); end it earlier or start the test later."
            )
        return self.get(first), self.get(last)

    def shift(self, seg: Any, step: int, rtype: str = SHIFT_SD) -> Span:
        """A span moved by `step` trading days: both ends, or the end alone ("expanding").

        An end behind the calendar becomes None. Raises CalendarEndError (a KeyError) where the
        start lies behind it.
        """
        if rtype not in (self.SHIFT_SD, self.SHIFT_EX):
            raise ConfigError(unknown_name("rtype", str(rtype), (self.SHIFT_SD, self.SHIFT_EX)))
        start, end = _pair(seg)
        first, last = self.align_idx(start, "start"), self.align_idx(end, "end")
        last = None if last is None else last + step
        if rtype == self.SHIFT_SD and first is not None:
            first += step
        if first is not None and first >= len(self.cals):
            raise CalendarEndError(
                f"{start}..{end} moved by {step} trading days starts after the calendar's end "
                f"({self.cals[-1]:%Y-%m-%d})."
            )
        return self.get(first), self.get(last)


def _calendar_of(source: Any, freq: str, future: bool) -> pd.DatetimeIndex:
    from qtorch.data.provider import build_source, default_source

    found: Source = default_source() if source is None else build_source(source)
    if future:
        try:
            return found.read_calendar(f"{freq}_future")
        except DataError:  # most data knows no days to come
            return found.calendar(freq=freq)
    return found.calendar(freq=freq)


def _pair(segment: Any) -> tuple[Any, Any]:
    if isinstance(segment, list | tuple) and len(segment) == 2:
        return segment[0], segment[1]
    raise ConfigError(f"a segment is two dates (start, end), got {segment!r:.80}.")
