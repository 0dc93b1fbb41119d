"""What separates the segments: the fit window of processors, the purge, and the embargo."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError
from qtorch.data.dataset.dataset import TRAIN
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.processor.base import Processor
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, Line
from qtorch.study.leakage.subject import Subject

LEARNT = (TRAIN, "valid")  # segments whose labels a training uses


def fit_window_line(subject: Subject) -> Line:
    """Tell on which days the processors are fitted, and whether these are days of training."""
    handler = subject.handler
    processors = handler.get_all_processors() if isinstance(handler, DataHandlerLP) else []
    processors = [p for p in processors if p.has_fit_window()]
    if not processors:
        return Line("fit window", OK, "no processor has statistics")
    calendar = subject.calendar
    wide, windows = [], []
    for processor in processors:
        rows = date_rows(calendar, *_fit_window(subject, processor))
        name = _processor_name(processor)
        windows.append(f"{name} {_days(calendar, rows)}")
        if TRAIN in subject.base.segments and rows.stop > subject.segment_rows(TRAIN).stop:
            wide.append(f"{name} is fitted on {_days(calendar, rows)}")
    if wide:
        train = _days(calendar, subject.segment_rows(TRAIN))
        return Line("fit window", LEAK, f"{'; '.join(wide)}, the train segment is {train}")
    if TRAIN not in subject.base.segments:
        return Line("fit window", UNKNOWN, f"no segment 'train'; {'; '.join(windows)}")
    return Line("fit window", OK, "; ".join(windows))


def _fit_window(subject: Subject, processor: Processor) -> tuple[Any, Any]:
    handler = subject.handler
    assert isinstance(handler, DataHandlerLP), "only these have processors"
    if processor.fit_start_time is not None or processor.fit_end_time is not None:
        return processor.fit_start_time, processor.fit_end_time
    train = subject.base.segments.get(TRAIN, (None, None))
    start = train[0] if handler.fit_start_time is None else handler.fit_start_time
    return start, train[1] if handler.fit_end_time is None else handler.fit_end_time


def _processor_name(processor: Processor) -> str:
    return type(getattr(processor, "inner", processor)).__name__


def purge_line(subject: Subject, reach: int | None) -> Line:
    """Tell how many days lie between the last label that is learnt and the next segment.

    `reach`: the days that a label looks ahead; None if it is unknown.
    """
    if reach is None:
        return Line("purge", UNKNOWN, "how far the label looks ahead is unknown")
    leaks: list[str] = []
    gaps: list[str] = []
    names = [name for name in LEARNT if name in subject.base.segments]
    for name in names:
        rows = subject.segment_rows(name)
        later = {n: subject.segment_rows(n) for n in subject.base.segments if n != name}
        shared = [n for n, r in later.items() if r.start < rows.stop and r.stop > rows.start]
        leaks += [f"{name} and {other} share days" for other in shared]
        starts = {r.start: n for n, r in later.items() if r.start >= rows.stop}
        last = _last_sample(subject, name)
        if not starts or last is None:
            continue
        first = min(starts)
        known_day, begin = (_day(subject.calendar, row) for row in (last + reach, first))
        text = (
            f"the last label of {name} is known on {known_day}, {starts[first]} begins on {begin}"
        )
        (leaks if last + reach >= first else gaps).append(text)
    if leaks:
        return Line("purge", LEAK, "; ".join(leaks))
    return Line("purge", OK, "; ".join(gaps) or "no segment follows one that is learnt")


def embargo_line(subject: Subject, reach: int | None) -> Line:
    """Tell whether labels of an earlier segment reach into the train segment."""
    if TRAIN not in subject.base.segments:
        return Line("embargo", UNKNOWN, "there is no segment 'train'")
    train = subject.segment_rows(TRAIN)
    rows = {n: subject.segment_rows(n) for n in subject.base.segments if n != TRAIN}
    earlier = {name: r for name, r in rows.items() if r.stop <= train.start}
    if not earlier:
        return Line("embargo", OK, "the train segment comes first")
    if reach is None:
        return Line("embargo", UNKNOWN, "how far the label looks ahead is unknown")
    gaps = {name: train.start - r.stop for name, r in earlier.items()}
    leaks = [name for name, gap in gaps.items() if gap < reach]
    text = ", ".join(f"{gap} days between {name} and train" for name, gap in gaps.items())
    if leaks:
        return Line("embargo", LEAK, f"{text}: labels of {', '.join(leaks)} reach into train")
    return Line("embargo", OK, f"{text}; the label looks {reach} ahead")


def _last_sample(subject: Subject, name: str) -> int | None:
    """Return the calendar row of the last sample of a segment that is learnt; None if empty."""
    try:
        samples = subject.base.samples(name)
    except DataError:
        return None
    day = samples.calendar[int(samples.date.max())]
    return int(subject.calendar.get_indexer(pd.DatetimeIndex([day]))[0])


def _day(calendar: pd.DatetimeIndex, row: int) -> str:
    if row >= len(calendar):
        return f"day {row - len(calendar) + 1} after the data"
    return f"{calendar[row]:%Y-%m-%d}"


def _days(calendar: pd.DatetimeIndex, rows: slice) -> str:
    if rows.stop <= rows.start:
        return "no day"
    return f"{_day(calendar, rows.start)}..{_day(calendar, rows.stop - 1)}"
