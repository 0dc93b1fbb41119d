"""Segments given as fractions of the calendar, as the dates that a task holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.instantiate import init_instance_by_config

Calendars = dict[str, pd.DatetimeIndex]


def with_dates(task: Mapping[str, Any], known: Calendars | None = None) -> dict[str, Any]:
    """The task with its dataset's fractional segments as dates of its source's calendar.

    Segments that are dates already stay as they are, and the source is then not touched. `known`
    keeps calendars for the next task of the same source.
    """
    dataset = task.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(task)
    segments = dataset.get("segments")
    if not isinstance(segments, Mapping) or not any(_is_fraction(v) for v in segments.values()):
        return dict(task)
    source = (dataset.get("handler") or {}).get("source")
    if source is None:
        raise ConfigError(
            "segments given as fractions need the data's calendar, but the handler names no "
            "source; give dates: segments.train=[2008-01-01,2014-12-31] and so on."
        )
    calendars, key = ({} if known is None else known), digest(source)
    if key not in calendars:
        calendars[key] = init_instance_by_config(source).calendar()
    dates = dates_of(segments, calendars[key])
    return {**task, "dataset": {**dataset, "segments": dates}}


def dates_of(segments: Mapping[str, Any], calendar: pd.DatetimeIndex) -> dict[str, list[str]]:
    """Fractions of a calendar, in their order, as inclusive `[first, last]` dates.

    Raises ConfigError for a mixture of both forms, a share that is not in (0, 1], a sum over
    one, and a share that holds no day.
    """
    dates = [name for name, value in segments.items() if not _is_fraction(value)]
    if dates:
        raise ConfigError(
            f"segments are all fractions or all dates; {', '.join(dates)} is not a fraction, the "
            "others are."
        )
    total = sum(float(v) for v in segments.values())
    if total > 1 + 1e-9 or any(not 0 < float(v) <= 1 for v in segments.values()):
        shares = ", ".join(f"{k}={v}" for k, v in segments.items())
        raise ConfigError(f"segments {shares}: each is in (0, 1] and their sum is at most 1.")
    out, share = {}, 0.0
    for name, value in segments.items():
        first = round(share * len(calendar))
        share += float(value)
        last = round(share * len(calendar)) - 1
        if last < first:
            raise ConfigError(
                f"segment {name}={value} holds no day: the calendar has {len(calendar)}."
            )
        out[name] = [f"{calendar[k]:%Y-%m-%d}" for k in (first, last)]
    return out


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
