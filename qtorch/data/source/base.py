"""What every source of bars gives: calendars, universes, and panels of bars."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError, unknown_name
from qtorch.core.trust import trusted_type
from qtorch.data.expression.evaluation import evaluate
from qtorch.data.expression.requirement import check_fields, fields_of, masked_of, reach
from qtorch.data.infinite import check_bars
from qtorch.data.panel import Panel, clip_spans, within_spans

Spans: TypeAlias = list[tuple[pd.Timestamp, pd.Timestamp]]
Membership: TypeAlias = dict[str, Spans]
Instruments: TypeAlias = str | Sequence[str] | Mapping[str, Spans]

_ALIASES = {"d": "day", "day": "day", "daily": "day", "w": "week", "week": "week"}


class Bars(NamedTuple):
    """What `Source.read_bars` returns.

    `values [F, D, N]` float32, NaN where there is no bar; `spans [N, 2]` int64 first and last
    stored row of each instrument, both inclusive, counted from the first row that was asked for
    and not cut to the rows asked for (`(0, -1)` where the instrument stores nothing).
    """

    values: Tensor
    spans: Tensor


@trusted_type
class Source(Configured, ABC):
    """A place that bars come from; every dataset starts at one.

    A source of one's own implements the six `read_*`, `fields`, `universes` and `fingerprint`
    methods; the rest follows. Field names stand without Qlib's `$`. The argument `instruments`
    is everywhere the name of a universe, a list of instruments (each a member on all days), or
    a mapping of instruments to membership spans. Dates are inclusive at both ends.
    """

    # -- what a source implements ----------------------------------------------------------------

    @abstractmethod
    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        """The whole calendar of a frequency, ascending, ns."""

    @abstractmethod
    def read_membership(self, universe: str) -> Membership:
        """The membership spans of a known universe; instruments in any order."""

    @abstractmethod
    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        """The bars of the calendar rows `rows`; DataError for an unknown field."""

    @abstractmethod
    def fields(self, freq: str = "day") -> tuple[str, ...]:
        """The fields stored for a frequency, without `$`."""

    @abstractmethod
    def universes(self) -> tuple[str, ...]:
        """The names of the universes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content (not of the place): equal data, equal fingerprint."""

    # -- what follows ----------------------------------------------------------------------------

    def stored_instruments(self) -> frozenset[str]:
        """Every instrument that may be named in a list."""
        return frozenset(name for u in self.universes() for name in self.read_membership(u))

    def calendar(
        self, start_time: Any = None, end_time: Any = None, freq: str = "day"
    ) -> pd.DatetimeIndex:
        """The trading days (or time stamps) of an inclusive date span; `D.calendar` in Qlib."""
        calendar = self.read_calendar(frequency(freq))
        return calendar[date_rows(calendar, start_time, end_time)]

    def instruments(self, universe: str = "all") -> Membership:
        """Membership spans of a universe by instrument, sorted; `D.list_instruments` in Qlib."""
        return dict(sorted(self.read_membership(self._universe(universe)).items()))

    def load(
        self,
        fields: Sequence[str] | None = None,
        *,
        instruments: Instruments = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        before: int | None = 0,
        after: int | None = 0,
    ) -> Panel:
        """A panel of bars: all fields, or those named, of the members between two dates.

        `before` and `after` add that many calendar rows at the ends (None: all there are), for
        windows that reach beyond the dates; the caller selects the dates again. An instrument is
        in the panel if it is a member on some day between the dates. Its values are all that is
        stored, on days outside its membership too; `mask` is membership and stored span, on all
        rows of the panel.

        Raises DataError where dates, universe, instrument or field select nothing or are unknown,
        and for infinite values where a handler loads that does not mend them (else a warning).
        """
        freq = frequency(freq)
        calendar = self.read_calendar(freq)
        rows = _selected_rows(calendar, start_time, end_time)
        first = 0 if before is None else max(0, rows.start - before)
        last = len(calendar) if after is None else min(len(calendar), rows.stop + after)
        membership = self._membership(instruments, calendar, rows)
        wanted = tuple(self.fields(freq) if fields is None else (f.lstrip("$") for f in fields))
        names = self._stored(sorted(membership), freq)
        bars = self.read_bars(names, wanted, freq, slice(first, last))
        check_bars(bars.values, wanted, calendar[first:last], names)
        spans = clip_spans(bars.spans, last - first)
        mask = within_spans(spans, last - first)
        mask &= _member_rows([membership[n] for n in names], calendar[first:last])
        return Panel(
            bars.values.permute(1, 2, 0),
            calendar[first:last],
            names,
            wanted,
            mask=mask,
            spans=spans,
        )

    def features(
        self,
        instruments: Instruments,
        fields: Sequence[str],
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
    ) -> pd.DataFrame:
        """Expressions as a frame; `D.features` in Qlib.

        Rows are `(instrument, datetime)` in Qlib's order, columns the expressions as given,
        float32. Windows see all the history that they need before `start_time`.
        """
        found = self.feature_panel(instruments, fields, start_time, end_time, freq)
        return found.to_frame().swaplevel().sort_index()

    def feature_panel(
        self,
        instruments: Instruments,
        fields: Sequence[str],
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
    ) -> Panel:
        """What `features` gives, as a panel of the dates asked for."""
        if isinstance(fields, str) or not len(fields):
            raise DataError(
                f"fields must be a list of expressions with at least one; got {fields!r}."
            )
        reaches = [reach(expression) for expression in fields]
        histories = [before for before, _ in reaches if before is not None]
        wanted: dict[str, Any] = {
            "fields": fields_of(fields),
            "start_time": start_time,
            "end_time": end_time,
            "freq": freq,
            "before": max(histories) if len(histories) == len(reaches) else None,
            "after": max(after for _, after in reaches),
        }
        bars = self.load_for(fields, instruments=instruments, **wanted)
        others = self.masked(fields, **wanted)
        found = evaluate(list(fields), bars, others=others)
        return found.select(start=start_time, end=end_time)

    def load_for(self, expressions: Iterable[str], **wanted: Any) -> Panel:
        """What `load(**wanted)` gives; where a field is missing, the error shows the expression
        that reads it, which is what a user can look for."""
        try:
            return self.load(**wanted)
        except DataError:
            check_fields(expressions, self.fields(wanted["freq"]))
            raise

    def masked(self, expressions: Iterable[str], **wanted: Any) -> Panel | None:
        """The bars of the instruments that `Mask` names in the expressions, whatever the
        universe; `wanted` are `load`'s other arguments. None where none is known."""
        known = {name.lower(): name for name in self.stored_instruments()}
        names = {known[n.lower()] for n in masked_of(expressions) if n.lower() in known}
        return self.load(instruments=sorted(names), **wanted) if names else None

    # -- selection -------------------------------------------------------------------------------

    def _universe(self, name: str) -> str:
        """The stored name of a universe (Qlib's file names are lower case)."""
        known = self.universes()
        if name in known:
            return name
        if name.lower() in known:
            return name.lower()
        raise DataError(unknown_name("universe", name, known))

    def _stored(self, names: list[str], freq: str) -> list[str]:
        """The names that have bars; a source may leave out, with a warning, those that have not."""
        return names

    def _membership(
        self, instruments: Instruments, calendar: pd.DatetimeIndex, rows: slice
    ) -> Membership:
        """The spans of the instruments that are members on some day of the rows."""
        start, end = calendar[rows.start], calendar[rows.stop - 1]
        if isinstance(instruments, str):
            found = self.read_membership(self._universe(instruments))
            what = f"universe {instruments!r}"
        else:
            found = self._listed(instruments)
            what = f"the list of {len(found)} instruments"
        inside = {
            name: spans
            for name, spans in found.items()
            if any(first <= end and last >= start.normalize() for first, last in spans)
        }
        if not inside:
            raise DataError(
                f"{what} has no member between {start:%Y-%m-%d} and {end:%Y-%m-%d}; "
                "choose other dates or another universe."
            )
        return inside

    def _listed(self, instruments: Sequence[str] | Mapping[str, Spans]) -> Membership:
        """A list or mapping of instruments as spans; each name must be known."""
        if not isinstance(instruments, Mapping):
            always = (pd.Timestamp.min, pd.Timestamp.max)
            instruments = {str(name): [always] for name in instruments}
        known = self.stored_instruments()
        for name in instruments:
            if name not in known:
                raise DataError(unknown_name("instrument", name, known))
        return {
            str(name): [(pd.Timestamp(a), pd.Timestamp(b)) for a, b in spans]
            for name, spans in instruments.items()
        }


def frequency(freq: str) -> str:
    """The name of a frequency as Qlib's files carry it: `day`, `1min`, `5min`, ..."""
    match = re.fullmatch(r"(\d*)\s*([a-z]+)", str(freq).strip().lower())
    if match is None:
        raise DataError(f"{freq!r} is not a frequency; expected e.g. 'day', '1min', '30min'.")
    count, unit = match.group(1), match.group(2)
    if unit in ("min", "minute"):
        return f"{int(count or 1)}min"
    unit = _ALIASES.get(unit, unit)
    return unit if count in ("", "1") else f"{count}{unit}"


def whole_days(ends: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """The last instants that the ends of spans mean: a bare date holds its whole day."""
    bare = (ends == ends.normalize()) & (ends < pd.Timestamp.max.normalize())
    return pd.DatetimeIndex(ends.asi8 + np.where(bare, 86_400 * 10**9 - 1, 0))


def _selected_rows(calendar: pd.DatetimeIndex, start: Any, end: Any) -> slice:
    """The rows of the dates, or an error that says what the calendar holds."""
    rows = date_rows(calendar, start, end)
    if rows.start < rows.stop:
        return rows
    held = f"{calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d}" if len(calendar) else "no dates"
    raise DataError(f"no trading day between {start} and {end}; the calendar holds {held}.")


def _member_rows(spans: Sequence[Spans], calendar: pd.DatetimeIndex) -> Tensor:
    """`[D, N]` bool: the days on which each instrument is a member."""
    columns = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    flat = [edge for instrument in spans for span in instrument for edge in span]
    edges = pd.DatetimeIndex(flat).as_unit("ns")
    starts = calendar.searchsorted(edges[::2], side="left")
    stops = calendar.searchsorted(whole_days(edges[1::2]), side="right")
    change = np.zeros((len(calendar) + 1, len(spans)), dtype=np.int16)
    np.add.at(change, (starts, columns), 1)
    np.add.at(change, (np.maximum(starts, stops), columns), -1)
    return torch.from_numpy(change.cumsum(0, dtype=np.int16)[:-1] > 0)
