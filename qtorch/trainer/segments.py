"""Segments of a task that are given as fractions of the data's calendar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from qtorch.core.dates import bar_text, is_intraday
from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.instantiate import init_instance_by_config

Calendars = dict[str, pd.DatetimeIndex]


def resolve_segments(task: Mapping[str, Any], calendars: Calendars | None = None) -> dict[str, Any]:
    """Replace fractional segments of the task's dataset by dates of its source's calendar.

    Segments that are dates already stay as they are, and the source is not read. `calendars` caches
    calendars for further tasks with the same source.
    """
    dataset = task.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(task)
    segments = dataset.get("segments")
    if not isinstance(segments, Mapping) or not has_fractions(segments):
        return dict(task)
    handler = dataset.get("handler")
    handler = handler if isinstance(handler, Mapping) else {}
    source, freq = handler.get("source"), handler.get("freq")
    if source is None:
        raise ConfigError(
            "segments given as fractions need the data's calendar, but the handler has no "
            "source; use dates: segments.train=[2008-01-01,2014-12-31] and so on."
        )
    calendar_cache, key = ({} if calendars is None else calendars), digest([source, freq])
    if key not in calendar_cache:
        calendar_cache[key] = init_instance_by_config(source).calendar(freq=freq)
    dates = segment_dates(segments, calendar_cache[key])
    return {**task, "dataset": {**dataset, "segments": dates}}


def segment_dates(segments: Mapping[str, Any], calendar: pd.DatetimeIndex) -> dict[str, list[str]]:
    """Convert fractions of a calendar, in their order, into inclusive `[first, last]` dates.

    The dates have times, and a boundary may be inside a day, if a day has several bars.
    Raises ConfigError if fractions and dates are mixed, if a fraction is not in (0, 1], if the sum
    exceeds 1, or if a segment contains no day.
    """
    check_fractions(segments)
    segments_out, share, has_times = {}, 0.0, is_intraday(calendar)
    for name, value in segments.items():
        first = round(share * len(calendar))
        share += float(value)
        last = round(share * len(calendar)) - 1
        if last < first:
            bars = "bars" if has_times else "days"
            raise ConfigError(
                f"segment {name}={value} contains no {bars[:-1]}: the calendar has "
                f"{len(calendar)} {bars}."
            )
        segments_out[name] = [
            bar_text(calendar[k]) if has_times else f"{calendar[k]:%Y-%m-%d}" for k in (first, last)
        ]
    return segments_out


def has_fractions(segments: Mapping[str, Any]) -> bool:
    """Whether any of the segments is a fraction of the calendar."""
    return any(map(_is_fraction, segments.values()))


def check_fractions(segments: Mapping[str, Any]) -> None:
    """Raise ConfigError for segments that no calendar can be divided into."""
    dates = [name for name, value in segments.items() if not _is_fraction(value)]
    if dates:
        raise ConfigError(
            f"segments must be all fractions or all dates; {', '.join(dates)} is not a fraction, "
            "the others are. With dates, write all of them: segments.train=[FIRST,LAST] "
            "segments.valid=[FIRST,LAST] segments.test=[FIRST,LAST]."
        )
    total = sum(float(v) for v in segments.values())
    if total > 1 + 1e-9 or any(not 0 < float(v) <= 1 for v in segments.values()):
        shares = ", ".join(f"{k}={v}" for k, v in segments.items())
        raise ConfigError(f"segments {shares}: each must be in (0, 1] and their sum at most 1.")


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
