"""`D`: calendars, instruments and features of the session's data, by Qlib's calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import ConfigError
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.source.base import Membership, Source, Spans
from qtorch.data.source.frame import default_source


class DataProvider:
    """The data of `qtorch.init(provider_uri=...)`. Corresponds to Qlib's `D`.

    Every call asks the source of the session, or the `source` that the provider was built with;
    its own methods `calendar`, `instruments` and `features` do the same without the session.
    Instruments are a universe's name, a list, a mapping of instruments to spans of dates, or what
    `D.instruments` returns. Point-in-time fields are not supported.
    """

    def __init__(self, source: Source | None = None) -> None:
        self._source = source

    @property
    def source(self) -> Source:
        """The source of the data."""
        return self._source or default_source()

    def calendar(
        self,
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        future: bool = False,
    ) -> pd.DatetimeIndex:
        """Return the bars between two dates (inclusive).

        Difference from Qlib: an index instead of an array; `future` must be False, because bars
        that are still to come are not read.
        """
        if future:
            raise ConfigError("calendars of the future are not read; pass future=False.")
        return self.source.calendar(start_time, end_time, freq)

    def instruments(
        self,
        market: str | Sequence[str] = "all",
        filter_pipe: Sequence[Any] | None = None,
        start_time: Any = None,
        end_time: Any = None,
    ) -> Any:
        """Return the description of a universe with its filters, for handlers and `D.features`.

        A list is returned as it is. `start_time` and `end_time` have no effect, as in Qlib.
        """
        if not isinstance(market, str):
            return list(market)
        return {"market": market, "filter_pipe": list(filter_pipe or ())}

    def list_instruments(
        self,
        instruments: Any,
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        as_list: bool = False,
    ) -> Any:
        """Return `{instrument: spans of dates}`, within two dates; with `as_list` the names."""
        market, filter_pipe = split_universe(instruments)
        calendar = self.source.calendar(freq=freq)
        start = calendar[0] if start_time is None else as_stamp(start_time)
        end = last_instant(calendar[-1] if end_time is None else end_time)
        if filter_pipe:
            members = self._filter_members(market, filter_pipe, start, end, freq)
        elif isinstance(market, str):
            members = self.source.instruments(market)
        elif isinstance(market, Mapping):
            members = {
                str(name): [(as_stamp(a), last_instant(b)) for a, b in spans]
                for name, spans in market.items()
            }
        else:
            members = {str(name): [(start, end)] for name in market}
        within = {name: _clip_spans(spans, start, end) for name, spans in members.items()}
        within = {name: spans for name, spans in within.items() if spans}
        return list(within) if as_list else within

    def features(
        self,
        instruments: Any,
        fields: Sequence[str],
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        disk_cache: int | None = None,
        inst_processors: Sequence[Any] = (),
    ) -> pd.DataFrame:
        """Evaluate expressions; the frame is by (instrument, datetime), the columns are `fields`.

        `disk_cache` has no effect: a handler has a cache of its own.
        """
        market, filter_pipe = split_universe(instruments)
        if not filter_pipe and not inst_processors:
            return self.source.features(market, list(fields), start_time, end_time, freq)
        loader = QlibDataLoader(
            {"feature": (list(fields), list(fields))},
            filter_pipe=filter_pipe,
            freq=freq,
            inst_processors=list(inst_processors) or None,
            source=self.source,
        )
        frame: pd.DataFrame = loader.load(market, start_time, end_time)
        return frame.droplevel(0, axis="columns").swaplevel().sort_index()

    def _filter_members(
        self,
        market: Any,
        filter_pipe: Sequence[Any],
        start: pd.Timestamp,
        end: pd.Timestamp,
        freq: str,
    ) -> Membership:
        """Return the spans of the bars on which an instrument passes the filters."""
        fields = ["$close"]
        universe = {"market": market, "filter_pipe": list(filter_pipe)}
        index = self.features(universe, fields, start, end, freq).index
        rows = pd.Series(self.source.calendar(freq=freq).get_indexer(index.get_level_values(1)))
        names = index.get_level_values(0)
        days = pd.DataFrame({"name": names, "row": rows, "day": index.get_level_values(1)})
        is_first = (days["name"] != days["name"].shift()) | (days["row"].diff() != 1)
        members: Membership = {}
        for _, part in days.groupby(is_first.cumsum()):
            span = part["day"].iloc[0], part["day"].iloc[-1]
            members.setdefault(str(part["name"].iloc[0]), []).append(span)
        return members


def split_universe(instruments: Any) -> tuple[Any, Sequence[Any]]:
    if isinstance(instruments, Mapping) and "market" in instruments:
        return instruments["market"], list(instruments.get("filter_pipe") or ())
    return instruments, ()


def _clip_spans(spans: Spans, start: pd.Timestamp, end: pd.Timestamp) -> Spans:
    clipped = [(max(first, start), min(last, end)) for first, last in spans]
    return [(first, last) for first, last in clipped if first <= last]


#: The data of the session.
D = DataProvider()
