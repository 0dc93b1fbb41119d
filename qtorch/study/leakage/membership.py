"""What universes and extras know of the end: survivors, concepts without dates, other extras."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import pandas as pd
import torch

from qtorch.data.dataset.extras import Concepts, Extra, Gatherable
from qtorch.data.source.base import Membership, Source
from qtorch.study.leakage.comparison import cells_differ
from qtorch.study.leakage.report import LEAK, OK, UNKNOWN, WARNING, Line
from qtorch.study.leakage.subject import Subject

ALL = "all"
END_DAYS = 10  # bars that end later than this many days before the data's end have not ended
MIN_LEAVERS, MIN_PROBABILITY = 5.0, 1e-4
MIN_YEARS, MIN_INSTRUMENTS = 2.0, 30


def survivors_line(subject: Subject) -> Line:
    """Tell whether a universe holds only instruments that are still there at the end.

    Nobody ever leaves it, although so many instruments of the source end that a universe chosen
    without knowing the end would hold some: the probability is hypergeometric.
    """
    name, source = "survivors", subject.source
    if source is None:
        return _frame_survivors(subject)
    handler = subject.dataset.handler
    calendar = source.calendar(handler.start_time, handler.end_time)
    every = _spans_of_all(source)
    start, end = calendar[0], calendar[max(0, len(calendar) - 1 - END_DAYS)]
    every = {n: (a, b) for n, (a, b) in every.items() if a < end and b >= start}
    leavers = {n for n, (_, b) in every.items() if b < end}
    years = (calendar[-1] - start).days / 365.25
    members, num_exits = _members(source, handler.instruments, start, end)
    if members is None:
        return Line(name, UNKNOWN, "the universe has no stored membership")
    members &= every.keys()
    observed, expected = len(members & leavers), len(members) * len(leavers) / max(1, len(every))
    text = (
        f"{observed} of {len(members)} instruments end before the data does; of all "
        f"{len(every)} of the source, {len(leavers)} do"
    )
    if expected >= MIN_LEAVERS and num_exits == 0 and observed == 0:
        luck = none_leaves_probability(len(every), len(leavers), len(members))
        if luck < MIN_PROBABILITY:
            detail = (
                f"nobody ever leaves the universe: {text}. It is chosen by who is there at the end"
            )
            return Line(name, LEAK, detail)
    if not leavers and years >= MIN_YEARS and len(every) >= MIN_INSTRUMENTS:
        return Line(name, WARNING, f"{text}: does the data lack delisted instruments?")
    return Line(name, OK, text)


def none_leaves_probability(num_all: int, num_leavers: int, num_members: int) -> float:
    """Return the probability that a random set of members holds no leaver (hypergeometric)."""
    if num_members > num_all - num_leavers:
        return 0.0
    return comb(num_all - num_leavers, num_members) / comb(num_all, num_members)


def _spans_of_all(source: Source) -> dict[str, tuple[pd.Timestamp, pd.Timestamp]]:
    """Return the first and last day of every instrument of a source."""
    universes = source.universes()
    spans: dict[str, tuple[pd.Timestamp, pd.Timestamp]] = {}
    for universe in [ALL] if ALL in universes else universes:
        for name, periods in source.read_membership(universe).items():
            first, last = min(a for a, _ in periods), max(b for _, b in periods)
            old = spans.get(name, (first, last))
            spans[name] = (min(old[0], first), max(old[1], last))
    return spans


def _members(
    source: Source, instruments: Any, start: pd.Timestamp, end: pd.Timestamp
) -> tuple[set[str] | None, int]:
    """Return the members of a universe on any day, and how many memberships end before `end`."""
    if isinstance(instruments, Mapping) and "market" in instruments:
        instruments = instruments["market"]
    membership: Membership
    if instruments is None or isinstance(instruments, str):
        try:
            membership = source.instruments(instruments or ALL)
        except ValueError:
            return None, 0
    elif isinstance(instruments, Mapping):
        membership = {
            str(n): [(pd.Timestamp(a), pd.Timestamp(b)) for a, b in spans]
            for n, spans in instruments.items()
        }
    else:
        return {str(n) for n in instruments}, 0
    inside = {name: [(a, b) for a, b in spans if b >= start] for name, spans in membership.items()}
    inside = {name: spans for name, spans in inside.items() if spans}
    num_exits = sum(b < end for spans in inside.values() for _, b in spans)
    return set(inside), num_exits


def _frame_survivors(subject: Subject) -> Line:
    """Tell whether any instrument of a frame ends before the data does."""
    view = subject.base.view()
    rows = view.history.cpu()
    num_dates = len(view.calendar)
    last = torch.where(rows, torch.arange(num_dates)[:, None], -1).amax(0)
    num_leavers = int((last < num_dates - END_DAYS).sum())
    text = f"{num_leavers} of {len(view.instruments)} instruments end before the data does"
    years = (view.calendar[-1] - view.calendar[0]).days / 365.25
    if not num_leavers and years >= MIN_YEARS and len(view.instruments) >= MIN_INSTRUMENTS:
        return Line("survivors", WARNING, f"{text}: does the data lack delisted instruments?")
    return Line("survivors", OK, text)


# -- extras ----------------------------------------------------------------------------------------


def concepts_line(subject: Subject) -> Line:
    """Tell whether the concepts of an instrument have dates, or are those of the table's day."""
    name = "concepts"
    tables = {k: e for k, e in subject.base.extras.items() if isinstance(e, Concepts)}
    if not tables:
        return Line(name, OK, "the dataset has no concepts")
    calendar = subject.calendar
    leaks: list[str] = []
    texts: list[str] = []
    for extra, table in tables.items():
        frame = table.memberships()
        if not len(frame):
            continue
        is_constant = frame["start"].isna() | (frame["start"] <= calendar[0])
        is_constant &= frame["end"].isna() | (frame["end"] >= calendar[-1])
        share = float(is_constant.mean())
        text = f"{extra}: {share:.0%} of {len(frame)} memberships hold on all days"
        (leaks if share == 1 else texts).append(text)
    if leaks:
        detail = (
            f"{'; '.join(leaks)}: memberships of one day are applied to the past; add start and end"
        )
        return Line(name, LEAK, detail)
    return Line(name, OK, "; ".join(texts) or "the tables are empty")


def extra_dates_line(subject: Subject) -> Line:
    """Bind every extra to a calendar that ends at a date: earlier values stay as they were."""
    name = "extras by date"
    if not subject.base.extras:
        return Line(name, OK, "the dataset has no extras")
    view = subject.base.view()
    moved = [
        f"{extra_name} on days up to {date:%Y-%m-%d}"
        for extra_name, extra in subject.base.extras.items()
        for date in subject.dates
        if _depends_on_later_dates(extra, view.calendar, view.instruments, date)
    ]
    if moved:
        detail = f"change when the calendar ends earlier: {'; '.join(moved)}"
        return Line(name, LEAK, detail)
    return Line(
        name, OK, f"{', '.join(subject.base.extras)}: a day's values do not depend on later days"
    )


def _depends_on_later_dates(
    extra: Extra, calendar: pd.DatetimeIndex, instruments: pd.Index, date: pd.Timestamp
) -> bool:
    stop = int(calendar.searchsorted(date, side="right"))
    whole, early = extra.bind(calendar, instruments), extra.bind(calendar[:stop], instruments)
    values = [_last_days(bound, stop, len(instruments)) for bound in (whole, early)]
    if values[0].shape != values[1].shape:
        return True
    return bool(cells_differ(values[0].float(), values[1].float(), 1.0).any())


def _last_days(bound: Gatherable, stop: int, num_instruments: int) -> torch.Tensor:
    dates = torch.arange(max(0, stop - 5), stop)
    return bound.gather(
        dates.repeat_interleave(num_instruments), torch.arange(num_instruments).repeat(len(dates))
    )
