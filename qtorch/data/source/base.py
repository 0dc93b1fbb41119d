"""The interface of every source of bars: calendars, universes, and panels of bars."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.dates import date_rows, frequency, parse_span_date
from qtorch.core.errors import DataError
from qtorch.core.tables import find_stored_name
from qtorch.core.trust import trust_subclasses
from qtorch.data.expression.evaluation import evaluate
from qtorch.data.expression.requirement import (
    check_fields,
    expression_fields,
    is_cross_sectional,
    mask_instruments,
    max_reach,
)
from qtorch.data.panel.infinite import check_bars
from qtorch.data.panel.panel import Panel, clip_spans, coverage_dates, within_spans

Spans: TypeAlias = list[tuple[pd.Timestamp, pd.Timestamp]]
Membership: TypeAlias = dict[str, Spans]
Instruments: TypeAlias = str | Sequence[str] | Mapping[str, Spans]

logger = logging.getLogger(__name__)


class Bars(NamedTuple):
    """The bars that `Source.read_bars` returns.

    `values [F, D, N]` are float32, NaN where there is no bar. `spans [N, 2]` int64 are the first
    and last stored row of each instrument, both inclusive. They are relative to the first
    requested row but not clipped to the requested rows; an instrument without any stored row has
    `(0, -1)`.
    """

    values: Tensor
    spans: Tensor


@trust_subclasses
class Source(Configured, ABC):
    """Base class of the data sources that provide bars to every dataset.

    To write a new source, implement the six abstract methods: `read_calendar`,
    `read_membership`, `read_bars`, `fields`, `universes` and `fingerprint`. Field names are
    written without Qlib's `$`. The argument `instruments` is always the name of a universe, a
    list of instruments (each a member on all days), or a mapping of instruments to membership
    spans. Dates are inclusive at both ends. `freq=None` means the source's own frequency
    (`resolve_frequency`); a source of other than daily bars overrides `frequencies`.
    """

    #: The frequency that is read if none is requested; None: see `resolve_frequency`.
    freq: str | None = None

    @property
    def knows_names(self) -> bool:
        """Whether names and the calendar are known without reading all bars.

        The names are those of fields, universes and instruments. Wrong names and dates in a
        configuration are then errors before the data is read.
        """
        return False

    # -- methods to implement --------------------------------------------------------------------

    @abstractmethod
    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        """Return the whole calendar of a frequency, ascending, in nanosecond resolution."""

    @abstractmethod
    def read_membership(self, universe: str) -> Membership:
        """Return the membership spans of an existing universe; instruments in any order."""

    @abstractmethod
    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        """Return the bars of the calendar rows `rows`; raise DataError for an unknown field."""

    @abstractmethod
    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        """Return the names of the fields stored for a frequency, without `$`."""

    @abstractmethod
    def universes(self) -> tuple[str, ...]:
        """Return the names of the universes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the data itself, not of its path: equal data has an equal hash."""

    # -- methods that every source inherits ------------------------------------------------------

    def frequencies(self) -> tuple[str, ...]:
        """Return the frequencies of the stored bars, as `frequency` spells them."""
        return ("day" if self.freq is None else frequency(self.freq),)

    def resolve_frequency(self, freq: str | None = None) -> str:
        """Return `freq` in Qlib's spelling.

        None means the source's `freq`, else daily bars if it has them, else its only frequency.
        Raises DataError if it has several, none of them daily.
        """
        freq = self.freq if freq is None else freq
        if freq is not None:
            return frequency(freq)
        stored = self.frequencies()
        if "day" in stored:
            return "day"
        if len(stored) == 1:
            return stored[0]
        raise DataError(
            f"the data has bars of several frequencies ({', '.join(stored)}) and none of them is "
            f"daily; choose one, e.g. freq={stored[0]!r}."
            if stored
            else "the data has no bars."
        )

    def find_fields(self, names: Iterable[str], freq: str | None = None) -> frozenset[str]:
        """Return those of the names that are stored fields; a source may find them faster."""
        return frozenset(names) & frozenset(self.fields(freq))

    def instrument_names(self) -> frozenset[str]:
        """Return all instruments of the source, which are those that a list may contain."""
        return frozenset(name for members in self.read_memberships().values() for name in members)

    def stored_instruments(self) -> list[str]:
        """Return all instruments of the source, sorted."""
        return sorted(self.instrument_names())

    def read_memberships(self) -> dict[str, Membership]:
        """Return all universes; one that cannot be read is left out with a warning."""
        memberships = {}
        for universe in self.universes():
            try:
                memberships[universe] = self.read_membership(universe)
            except DataError as error:
                logger.warning("universe %r cannot be read and is left out: %s", universe, error)
        return memberships

    def calendar(
        self, start_time: Any = None, end_time: Any = None, freq: str | None = None
    ) -> pd.DatetimeIndex:
        """Return the trading days (or timestamps) of a date span; `D.calendar` in Qlib."""
        calendar = self.read_calendar(self.resolve_frequency(freq))
        return calendar[date_rows(calendar, start_time, end_time)]

    def instruments(self, universe: str = "all") -> Membership:
        """Return `{instrument: membership spans}`, sorted; `D.list_instruments` in Qlib."""
        return dict(sorted(self.read_membership(self.resolve_universe(universe)).items()))

    def load(
        self,
        fields: Sequence[str] | None = None,
        *,
        instruments: Instruments = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
        before: int | None = 0,
        after: int | None = 0,
        members_before: bool = False,
    ) -> Panel:
        """Load a panel of bars: the fields (default: all) of the members between two dates.

        `before` and `after` add that many calendar rows at the two ends (None: all rows), for
        windows that reach beyond the dates; the caller then selects the dates again. An
        instrument is in the panel if it is a member on at least one day between the dates. Its
        values include all that is stored, also on days outside its membership. On every row of
        the panel, `mask` is True if the instrument is a member and the row is in its stored span.
        With `members_before`, the panel also has the instruments that are members on the rows
        added at the two ends alone, so that every row has its whole universe.

        Raises DataError if the dates, universe, instruments or fields are unknown or select
        nothing. Infinite values raise DataError while a handler without a processor for them
        loads the bars, and otherwise cause a warning.
        """
        freq = self.resolve_frequency(freq)
        calendar = self.read_calendar(freq)
        rows = _select_rows(calendar, start_time, end_time)
        first = 0 if before is None else max(0, rows.start - before)
        last = len(calendar) if after is None else min(len(calendar), rows.stop + after)
        membership = self.select_members(
            instruments, calendar, slice(first, last) if members_before else rows
        )
        field_names = tuple(
            self.fields(freq) if fields is None else (f.lstrip("$") for f in fields)
        )
        names = self._drop_missing_instruments(sorted(membership), freq)
        bars = self.read_bars(names, field_names, freq, slice(first, last))
        check_bars(bars.values, field_names, calendar[first:last], names)
        spans = clip_spans(bars.spans, last - first)
        mask = within_spans(spans, last - first)
        mask &= _member_rows([membership[n] for n in names], calendar[first:last])
        return Panel(
            bars.values.permute(1, 2, 0),
            calendar[first:last],
            names,
            field_names,
            mask=mask,
            spans=spans,
        )

    def features(
        self,
        instruments: Instruments,
        fields: Sequence[str],
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
    ) -> pd.DataFrame:
        """Evaluate expressions and return a DataFrame; `D.features` in Qlib.

        The index is `(instrument, datetime)` in Qlib's order; the columns are the expressions as
        written, float32. Rolling windows use all the history that they need before `start_time`.
        """
        panel = self.feature_panel(instruments, fields, start_time, end_time, freq)
        return panel.to_frame().swaplevel().sort_index()

    def feature_panel(
        self,
        instruments: Instruments,
        fields: Sequence[str],
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
    ) -> Panel:
        """Return the result of `features` as a Panel of the requested dates."""
        if isinstance(fields, str) or not len(fields):
            raise DataError(
                f"fields must be a list of expressions with at least one; got {fields!r}."
            )
        before, after = max_reach(fields)
        bars, mask_bars = self.load_for_expressions(
            fields,
            instruments=instruments,
            fields=expression_fields(fields),
            start_time=start_time,
            end_time=end_time,
            freq=freq,
            before=before,
            after=after,
        )
        rows = bars.rows(start_time, end_time)
        panel = evaluate(list(fields), bars, mask_bars=mask_bars, rows=rows)
        return drop_nonmembers(panel) if is_cross_sectional(fields) else panel

    def load_for_expressions(
        self, expressions: Iterable[str], *, instruments: Instruments, **load_arguments: Any
    ) -> tuple[Panel, Panel | None]:
        """Load the bars that expressions read, and those of the instruments that `Mask` names.

        `load_arguments` are the other arguments of `load`. The named instruments are loaded
        whether or not they belong to the universe; None if there are none. For an expression that
        compares the instruments of a day, the bars have the whole universe of every row. A user
        wrote the expressions, not the list of fields, so an error for a missing field shows the
        expression.
        """
        expressions = list(expressions)
        try:
            if is_cross_sectional(expressions):
                load_arguments["members_before"] = True
            bars = self.load(instruments=instruments, **load_arguments)
        except DataError:
            check_fields(
                expressions, self.fields(self.resolve_frequency(load_arguments.get("freq")))
            )
            raise
        mask_names = {name.lower() for name in mask_instruments(expressions)}
        if not mask_names:
            return bars, None
        stored_names = sorted(n for n in self.instrument_names() if n.lower() in mask_names)
        if not stored_names:
            return bars, None
        return bars, self.load(instruments=stored_names, **load_arguments)

    # -- selection -------------------------------------------------------------------------------

    def resolve_universe(self, name: str) -> str:
        """Return the stored name of a universe; Qlib's file names are lower case.

        Raises DataError for an unknown name, and ConfigError for one that is not text.
        """
        stored_names = self.universes()
        if isinstance(name, str) and name.lower() in stored_names and name not in stored_names:
            return name.lower()
        return find_stored_name(name, stored_names, "universe")

    def check_expressions(self, expressions: Collection[str], freq: str | None = None) -> None:
        """Raise ExpressionError for a field in expressions that is not stored."""
        names = expression_fields(expressions)
        if len(self.find_fields(names, freq)) < len(names):
            check_fields(expressions, self.fields(freq))

    def check_instruments(self, instruments: Instruments) -> None:
        """Raise DataError for a universe or an instrument that the source does not have.

        Raises ConfigError for a name that is not text.
        """
        if isinstance(instruments, str) or not isinstance(instruments, Iterable):
            self.resolve_universe(instruments)
        else:
            self._parse_instruments(instruments)

    def _drop_missing_instruments(self, names: list[str], freq: str) -> list[str]:
        """Return the names that have bars; a source may drop others with a warning."""
        return names

    def select_members(
        self, instruments: Instruments, calendar: pd.DatetimeIndex, rows: slice
    ) -> Membership:
        """Return the spans of the instruments that are members on at least one of the rows."""
        start, end = calendar[rows.start], calendar[rows.stop - 1]
        if isinstance(instruments, str) or not isinstance(instruments, Iterable):
            membership = self.read_membership(self.resolve_universe(instruments))
            source_text = f"universe {instruments!r}"
        else:
            membership = self._parse_instruments(instruments)
            source_text = f"the list of {len(membership)} instruments"
        members = {
            name: spans
            for name, spans in membership.items()
            if any(first <= end and last >= start.normalize() for first, last in spans)
        }
        if not members:
            raise DataError(
                f"{source_text} has no member between {start:%Y-%m-%d} and {end:%Y-%m-%d}; "
                "choose other dates or another universe."
            )
        return members

    def _parse_instruments(self, instruments: Sequence[str] | Mapping[str, Spans]) -> Membership:
        """Convert a list or mapping of instruments to spans; DataError for an unknown name."""
        if not isinstance(instruments, Mapping):
            always = (pd.Timestamp.min, pd.Timestamp.max)
            instruments = {name: [always] for name in instruments}
        stored_names = self.instrument_names()
        return {
            find_stored_name(name, stored_names, "instrument"): [
                (parse_span_date(a, is_end=False), parse_span_date(b, is_end=True))
                for a, b in spans
            ]
            for name, spans in instruments.items()
        }


def drop_nonmembers(panel: Panel) -> Panel:
    """Drop the instruments that are members on none of the panel's dates."""
    is_member = panel.mask.any(0).cpu().numpy()
    if is_member.all():
        return panel
    return panel.select(instruments=list(panel.instruments[is_member]))


def extend_to_day_end(ends: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """Return the last instant of each span end: a date without a time includes its whole day."""
    bare = (ends == ends.normalize()) & (ends < pd.Timestamp.max.normalize())
    return pd.DatetimeIndex(ends.asi8 + np.where(bare, 86_400 * 10**9 - 1, 0))


def _select_rows(calendar: pd.DatetimeIndex, start: Any, end: Any) -> slice:
    """Return the rows of the dates; raise DataError with the calendar's range if there are none."""
    rows = date_rows(calendar, start, end)
    if rows.start < rows.stop:
        return rows
    dates = coverage_dates(calendar)
    raise DataError(f"no trading day between {start} and {end}; the calendar has {dates}.")


def _member_rows(spans: Sequence[Spans], calendar: pd.DatetimeIndex) -> Tensor:
    """Return `[D, N]` bool: the days on which each instrument is a member."""
    columns = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    flat = [edge for instrument in spans for span in instrument for edge in span]
    edges = pd.DatetimeIndex(flat).as_unit("ns")
    starts = calendar.searchsorted(edges[::2], side="left")
    stops = calendar.searchsorted(extend_to_day_end(edges[1::2]), side="right")
    change = np.zeros((len(calendar) + 1, len(spans)), dtype=np.int16)
    np.add.at(change, (starts, columns), 1)
    np.add.at(change, (np.maximum(starts, stops), columns), -1)
    return torch.from_numpy(change.cumsum(0, dtype=np.int16)[:-1] > 0)
