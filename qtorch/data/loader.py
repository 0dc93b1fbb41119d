"""Loaders: from a source of bars, a user's frames, or other loaders to a view of raw columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.identity import digest
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.data.columns import Columns, PanelColumns, instrument_major
from qtorch.data.data_loader import DataLoader, ForeignLoader
from qtorch.data.expression import evaluate, fields_of, reach
from qtorch.data.feature_cache import cache_in_use
from qtorch.data.feature_key import feature_key
from qtorch.data.fields import narrowed, parse_fields, reach_of
from qtorch.data.filter import DynamicFilter, build_filters
from qtorch.data.frames import (
    read_frame,
    view_of_frame,
    view_of_frames,
)
from qtorch.data.infinite import checked
from qtorch.data.inst_processor import build_inst_processors
from qtorch.data.join import HOW, joined, restricted
from qtorch.data.panel import Panel, clip_spans
from qtorch.data.processor.base import Names
from qtorch.data.provider import build_source, default_source
from qtorch.data.source.base import Source
from qtorch.data.view import View

log = logging.getLogger(__name__)

MODULE = "qtorch.data.loader"
INSTRUMENTS_AT_ONCE = 128


class QlibDataLoader(DataLoader):
    """Expressions over a source's bars.

    `config`: `{group: fields}` or `fields` alone, with `fields` a list of expressions (which are
    then the columns' names too) or `(expressions, names)`. `filter_pipe`: dynamic filters of the
    universe; they act on lists of instruments too (Qlib's do not). `inst_processors`:
    TimeRangeFlt, or callables `(frame, instrument=...) -> frame` of each instrument that may
    drop dates and change values; a list, for all groups. `source`: a Source, its configuration,
    or the folder of Qlib's files; None takes the handler's.

    `swap_level` is taken for Qlib's sake and must stay True. One frequency serves all groups.
    Point-in-time fields (`$$...`, `P(...)`) are refused.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | Sequence[Any],
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] = "day",
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        source: Any = None,
    ) -> None:
        if not swap_level:
            raise ConfigError(
                "swap_level=False (instrument before date) is not supported: swap the result of "
                "load(...) with frame.swaplevel().sort_index()."
            )
        self.config = config
        self.filter_pipe = filter_pipe
        self.freq = _one_frequency(freq)
        self.inst_processors = inst_processors
        self.source = source
        self._fields = parse_fields(plain(config))
        self._filters = build_filters(filter_pipe)
        self._inst_processors = build_inst_processors(inst_processors)
        self._own_source = None if source is None else build_source(source)

    def names(self) -> Names:
        return {group: tuple(fields) for group, fields in self._fields.items()}

    def expressions(self) -> dict[str, dict[str, str]]:
        """`{group: {column: expression}}`."""
        return {group: dict(fields) for group, fields in self._fields.items()}

    def horizon(self, group: str = "label") -> int | None:
        if group not in self._fields:
            return None
        return max(reach(e)[1] for e in self._fields[group].values())

    def needs_source(self) -> bool:
        return self._own_source is None

    def fingerprint(self, source: Source | None = None) -> str:
        return (self._own_source or source or default_source()).fingerprint()

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        fields = narrowed(self._fields, columns)
        source = self._own_source or source or default_source()
        universe, more = _universe(instruments)
        filters = [*self._filters, *build_filters(more)]

        def compute() -> View:
            return self._computed(source, universe, start_time, end_time, fields, filters)

        cache, named = cache_in_use(), None
        if cache is not None:
            named = feature_key(
                self,
                source,
                universe=universe,
                start_time=start_time,
                end_time=end_time,
                freq=self.freq,
                fields=fields,
                filters=filters,
            )
        view = compute() if cache is None or named is None else cache.get(*named, make=compute)
        for process in self._inst_processors:
            view = process(view)
        return view

    def _computed(
        self,
        source: Source,
        universe: Any,
        start_time: Any,
        end_time: Any,
        fields: Mapping[str, Mapping[str, str]],
        filters: Sequence[DynamicFilter],
    ) -> View:
        rules = [e for f in filters for e in f.expressions()]
        wanted = self._wanted(start_time, end_time, fields, rules)
        said = [e for part in fields.values() for e in part.values()]
        bars = source.load_for([*said, *rules], instruments=universe, **wanted)
        others = source.masked(said, **wanted)
        for each in filters:
            mask = each.members(bars)
            bars = Panel(
                bars.values,
                bars.calendar,
                bars.instruments,
                bars.fields,
                mask=mask,
                spans=bars.spans,
            )
        bars = _members_only(bars, start_time, end_time) if filters else bars
        span = bars.rows(start_time, end_time)
        more = {} if others is None else {"others": others}
        groups = {g: self.columns_of(g, bars, span, names, **more) for g, names in fields.items()}
        rows = bars.mask[span].contiguous()
        return View(groups, rows, rows)

    def columns_of(
        self,
        group: str,
        bars: Panel,
        span: slice,
        expressions: Mapping[str, str],
        others: Panel | None = None,
    ) -> Columns:
        """The columns of one group for the rows `span` of the bars; `others` are the bars of
        instruments that the expressions look at besides."""
        return evaluated(expressions, bars, span, others)

    def needs(self, group: str, expressions: Mapping[str, str]) -> tuple[int | None, int]:
        """Rows before and after the dates that a group's expressions need."""
        return reach_of(expressions.values())

    def fields_of_group(self, group: str, expressions: Mapping[str, str]) -> tuple[str, ...]:
        """The stored fields that a group's expressions read."""
        return fields_of(expressions)

    def _wanted(
        self,
        start_time: Any,
        end_time: Any,
        fields: Mapping[str, Mapping[str, str]],
        rules: Sequence[str],
    ) -> dict[str, Any]:
        """What to load, but for the instruments."""
        reaches = [self.needs(group, expressions) for group, expressions in fields.items()]
        reaches.append(reach_of(rules))
        before = None if any(b is None for b, _ in reaches) else max(b or 0 for b, _ in reaches)
        wanted = dict.fromkeys(f for g, e in fields.items() for f in self.fields_of_group(g, e))
        wanted.update(dict.fromkeys(fields_of(rules)))
        return {
            "fields": list(wanted),
            "start_time": start_time,
            "end_time": end_time,
            "freq": self.freq,
            "before": before,
            "after": max(a for _, a in reaches),
        }


class StaticDataLoader(DataLoader):
    """A user's own data: a DataFrame, `{group: DataFrame or path}`, or a path.

    Frames are indexed by `(datetime, instrument)`; two-level columns are `(group, column)`. Files
    are parquet or CSV, with `datetime` and `instrument` as index or columns. `join` says which
    rows several frames have together. Values become float32; infinite ones need a ProcessInf.

    Instruments are given as a list, or as one name of the data, or as a universe of the handler's
    source; None and "all" mean every one.
    """

    def __init__(self, config: Any, join: str = "outer") -> None:
        if join not in HOW:
            raise ConfigError(unknown_name("join", join, HOW))
        self.config = config
        self.join = join
        self._view: View | None = None

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        if self._view is None:
            self._view = self._read()
        members = static_members(instruments, self._view, source)
        view = restricted(self._view, members, start_time, end_time)
        return checked(view if columns is None else _kept(view, columns))

    def _read(self) -> View:
        if isinstance(self.config, Mapping):
            frames = {str(g): read_frame(part) for g, part in self.config.items()}
            return view_of_frames(frames, self.join)
        return view_of_frame(read_frame(self.config))


class NestedDataLoader(DataLoader):
    """Several loaders' columns side by side; of a doubled column the later loader's counts.

    `join`: the rows that stay, "left" those of the first loader. Columns come sorted by name, as
    in Qlib.
    """

    def __init__(self, dataloader_l: Sequence[Any], join: str = "left") -> None:
        if join not in HOW:
            raise ConfigError(unknown_name("join", join, HOW))
        if not dataloader_l:
            raise ConfigError("NestedDataLoader needs at least one loader.")
        self.dataloader_l = dataloader_l
        self.join = join
        self._loaders = [build_loader(each) for each in dataloader_l]

    def horizon(self, group: str = "label") -> int | None:
        known = [h for h in (each.horizon(group) for each in self._loaders) if h is not None]
        return max(known) if known else None

    def needs_source(self) -> bool:
        return any(each.needs_source() for each in self._loaders)

    def fingerprint(self, source: Source | None = None) -> str:
        return digest([each.fingerprint(source) for each in self._loaders])

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        views = []
        for k, each in enumerate(self._loaders):
            # The first loader's rows decide; a frame that knows no universe gives all it has.
            whole = k > 0 and isinstance(each, StaticDataLoader) and self.join == "left"
            asked = None if whole else instruments
            views.append(each.view(asked, start_time, end_time, source=source))
        view = joined(views, self.join)
        groups = {g: view.groups[g].keep(sorted(view.groups[g].names)) for g in sorted(view.groups)}
        return View(groups, view.rows, view.history)


# -- parts -----------------------------------------------------------------------------------------


def build_loader(config: Any) -> DataLoader:
    """A loader from its configuration, its bare name, or any object with Qlib's `load(...)`."""
    config = plain(config)
    if config is None:
        raise ConfigError("a handler needs data_loader=..., or DataHandlerLP.from_df(frame).")
    if isinstance(config, pd.DataFrame):
        return StaticDataLoader(config)
    if not isinstance(config, str | Mapping) and callable(getattr(config, "load", None)):
        return config if isinstance(config, DataLoader) else ForeignLoader(config)
    made = init_instance_by_config(config, MODULE, accept_types=DataLoader)
    return made if isinstance(made, DataLoader) else ForeignLoader(made)


def evaluated(
    expressions: Mapping[str, str], bars: Panel, span: slice, others: Panel | None = None
) -> Columns:
    """Expressions of the bars on the rows `span`, stored by instrument: packing them is free."""
    ahead = reach_of(expressions.values())[1]
    # What lies behind the dates is only for labels; features shall not pay for it.
    stop = min(len(bars.calendar), span.stop + ahead)
    seen = bars
    if stop < len(bars.calendar):
        end = bars.calendar[stop - 1]
        seen, others = bars.select(end=end), None if others is None else others.select(end=end)
    n = len(bars.instruments)
    out = instrument_major(span.stop - span.start, n, len(expressions))
    if span == slice(0, len(seen.calendar)):
        return PanelColumns(evaluate(expressions, seen, out=out, others=others))
    # History in front is not kept: blocks of instruments are computed whole and cut.
    for first in range(0, n, INSTRUMENTS_AT_ONCE):
        part = slice(first, first + INSTRUMENTS_AT_ONCE)
        block = _instruments(seen, part)
        out[:, part] = evaluate(expressions, block, others=others).values[span]
    dates = bars.calendar[span]
    mask, spans = bars.mask[span], clip_spans(bars.spans - span.start, len(dates))
    return PanelColumns(
        Panel(out, dates, bars.instruments, list(expressions), mask=mask, spans=spans)
    )


def _instruments(bars: Panel, part: slice) -> Panel:
    return Panel(
        bars.values[:, part],
        bars.calendar,
        bars.instruments[part],
        bars.fields,
        mask=bars.mask[:, part],
        spans=bars.spans[part],
    )


def static_members(instruments: Any, view: View, source: Source | None) -> Any:
    """What `instruments` means for data without universes: None for all, else names or spans."""
    if instruments is None or (isinstance(instruments, str) and instruments.lower() == "all"):
        return None
    if isinstance(instruments, str):
        if instruments in view.instruments:
            return [instruments]
        if source is not None and instruments in source.universes():
            return source.instruments(instruments)
        raise DataError(
            f"the data has no universe {instruments!r}: a frame knows no universes. Give a list "
            "of instruments, None for all, or a source=... that has this universe."
        )
    return instruments


def _kept(view: View, columns: Names) -> View:
    groups = {g: c.keep(columns[g]) for g, c in view.groups.items() if columns.get(g)}
    return View(groups, view.rows, view.history)


def _universe(instruments: Any) -> tuple[Any, Any]:
    """The universe, and a filter pipe that came with it (Qlib's `D.instruments` dict)."""
    if instruments is None:
        log.info("no instruments given: all of the source's are loaded")
        return "all", None
    instruments = plain(instruments)
    if isinstance(instruments, Mapping) and "market" in instruments:
        return instruments["market"], instruments.get("filter_pipe")
    return instruments, None


def _members_only(bars: Panel, start: Any, end: Any) -> Panel:
    """The panel without instruments that are members on none of the dates."""
    kept = bars.mask[bars.rows(start, end)].any(0)
    if bool(kept.all()):
        return bars
    if not bool(kept.any()):
        raise DataError("the filter_pipe leaves no instrument on any day; loosen its rules.")
    chosen = torch.nonzero(kept)[:, 0].cpu().numpy()
    return bars.select(instruments=list(bars.instruments[chosen]))


def _one_frequency(freq: str | Mapping[str, str]) -> str:
    if isinstance(freq, str):
        return freq
    found = set(freq.values())
    if len(found) == 1:
        return found.pop()
    raise ConfigError(
        f"groups of several frequencies ({dict(freq)}) are not supported; give one freq, and "
        "build the others as expressions or as columns of a frame."
    )
