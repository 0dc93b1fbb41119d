"""Data loaders: build a view of raw columns from a source of bars, frames, or other loaders."""

from __future__ import annotations

import copy
import logging
import re
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from qtorch.core.configured import Configured
from qtorch.core.content_digest import digest_text
from qtorch.core.errors import ConfigError, DataError, check_name, unknown_name_message
from qtorch.core.identity import digest
from qtorch.core.instantiate import init_instance_by_config, resolve_config
from qtorch.core.tables import is_frame, not_text_message
from qtorch.core.trust import trust_subclasses
from qtorch.data.expression import evaluate, expression_fields
from qtorch.data.expression.requirement import (
    is_cross_sectional,
    join_reaches,
    max_reach,
)
from qtorch.data.handler.feature_cache import current_feature_cache, feature_key
from qtorch.data.handler.feature_device import current_feature_device
from qtorch.data.handler.filter import DynamicFilter, build_filters
from qtorch.data.panel.columns import Columns, PanelColumns, instrument_major
from qtorch.data.panel.frames import (
    ReadOptions,
    read_frame,
    view_fingerprint,
    view_from_frame,
    view_from_frames,
    view_to_frame,
)
from qtorch.data.panel.infinite import check_view
from qtorch.data.panel.panel import Panel, duplicate_names
from qtorch.data.panel.view import FLAT, HOW, View, join_views, reindex_view, restrict_view
from qtorch.data.processor.base import Names
from qtorch.data.processor.instrument import build_inst_processors
from qtorch.data.source.base import Source
from qtorch.data.source.frame import build_source, default_source

log = logging.getLogger(__name__)

MODULE = "qtorch.data"
RAW_COLUMNS, ALL_COLUMNS = "__raw", "__all"  # column sets of a handler: in groups, or all as one
POINT_IN_TIME = re.compile(r"\$\$|\bP(Ref)?\s*\(")


class DataChange(Protocol):
    """A change of the data that loaders read, such as `FutureChange`."""

    def change_source(self, source: Source) -> Source:
        """Return a source of the changed bars."""

    def change_view(self, view: View) -> View:
        """Return the changed view of data that has no source of bars."""


@trust_subclasses
class DataLoader(Configured, ABC):
    """The source of a handler's raw data.

    `view` returns columns by group over a calendar and instruments; `load` returns the same as a
    frame, as in Qlib. A user's loader overrides either of them: with only `load` (Qlib's protocol,
    a `(datetime, instrument)` frame) the view is built from the frame. Loaded values may be
    infinite, e.g. after a division in an expression; handling them is left to the processors.
    Corresponds to qlib/data/dataset/loader.py.
    """

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        """Load the raw data between two dates, both inclusive; None is open.

        `source` is used by a loader that has no source of its own. `columns` names the requested
        columns by group; others may be left out.
        """
        if type(self).load is DataLoader.load:
            raise ConfigError(f"{type(self).__name__} must override view(...) or load(...).")
        return view_from_frame(self.load(instruments, start_time, end_time))

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        """Load the raw data as a `(datetime, instrument)` frame, float32."""
        return view_to_frame(self.view(instruments, start_time, end_time))

    def names(self) -> Names | None:
        """Return the columns by group if they are known before loading, else None."""
        return None

    def horizon(self, group: str = "label") -> int | None:
        """Return how many calendar rows a group's values look ahead; None if unknown."""
        return None

    def frequency(self, source: Source | None = None) -> str | None:
        """Return the frequency of the bars that are loaded, such as "30min"; None if unknown."""
        return None

    def bars_source(self, source: Source | None = None) -> Source | None:
        """Return the source of bars: the loader's own, else `source`, the handler's."""
        return source

    def needs_source(self) -> bool:
        """Whether the loader reads a source of bars and has none of its own."""
        return False

    def find_calendar(self, source: Source | None = None) -> pd.DatetimeIndex | None:
        """Return the dates that loaded data may have; None if only loading it can tell."""
        return None

    def bind_train_segment(self, start: Any, end: Any) -> bool:
        """Set the dataset's train segment for handlers that the loader reads, if it reads any.

        Returns whether data that was loaded before may have changed.
        """
        return False

    def check_settings(self, instruments: Any = None, source: Source | None = None) -> None:
        """Raise an error for settings that no data can be loaded with; nothing is loaded.

        `instruments` and `source` are those of the handler.
        """

    def change_data(self, change: DataChange) -> DataLoader:
        """Return a loader of changed data; the caller changes the handler's source.

        Here the result of `view` is changed, because its data may come from anywhere.
        """
        return ChangedLoader(self, change)

    def fingerprint(self, source: Source | None = None) -> str:
        """Return a hash of the content that is loaded.

        This loads the data; a loader of large data should override it. A training compares the
        hash before it loads the data with that after it.
        """
        return view_fingerprint(self.view(source=source))


class QlibDataLoader(DataLoader):
    """Evaluate expressions over the bars of a source.

    `config`: `{group: fields}` or `fields` alone, where `fields` is a list of expressions (which
    then also name the columns) or `(expressions, names)`. `filter_pipe`: dynamic filters of the
    universe; they also act on lists of instruments (Qlib's do not). `inst_processors`:
    TimeRangeFlt, or callables `(frame, instrument=...) -> frame` that process one instrument and
    may drop dates and change values; one list for all groups. `source`: a Source, its
    configuration, or a folder of Qlib's files; None uses the handler's source. `freq` is the
    frequency of the bars ("day", "30min"); None is that of the source.

    `swap_level` exists for compatibility with Qlib and must stay True. All groups have the same
    frequency. Point-in-time fields (`$$...`, `P(...)`) are not supported.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | Sequence[Any],
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] | None = None,
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        source: Any = None,
    ) -> None:
        if not swap_level:
            raise ConfigError(
                "swap_level=False (instrument before date) is not supported; reorder the result "
                "of load(...) with frame.swaplevel().sort_index()."
            )
        self.config = config
        self.filter_pipe = filter_pipe
        self.freq = _single_frequency(freq)
        self.inst_processors = inst_processors
        self.source = source
        self._fields = parse_fields(resolve_config(config))
        self._filters = build_filters(filter_pipe)
        self._inst_processors = build_inst_processors(inst_processors)
        self._own_source = None if source is None else build_source(source)

    def names(self) -> Names:
        return {group: tuple(fields) for group, fields in self._fields.items()}

    def expressions(self) -> dict[str, dict[str, str]]:
        """Return `{group: {column: expression}}`."""
        return {group: dict(fields) for group, fields in self._fields.items()}

    def horizon(self, group: str = "label") -> int | None:
        if group not in self._fields:
            return None
        return max_reach(self._fields[group].values())[1]

    def frequency(self, source: Source | None = None) -> str:
        return self._resolve_source(source).resolve_frequency(self.freq)

    def bars_source(self, source: Source | None = None) -> Source | None:
        return self._own_source or source

    def needs_source(self) -> bool:
        return self._own_source is None

    def find_calendar(self, source: Source | None = None) -> pd.DatetimeIndex | None:
        source = self._own_source or source
        if source is None or not source.knows_names:
            return None
        return source.read_calendar(source.resolve_frequency(self.freq))

    def check_settings(self, instruments: Any = None, source: Source | None = None) -> None:
        """Parse all expressions; check the names of fields, universe, instruments if known."""
        rules = [rule for each in self._filters for rule in each.expressions()]
        expressions = [*(e for part in self._fields.values() for e in part.values()), *rules]
        max_reach(expressions)
        source = self._own_source or source
        if source is None or not source.knows_names:
            return
        source = self.field_source(source, self._fields)
        source.check_expressions(expressions, self.freq)
        source.check_instruments(split_universe("all" if instruments is None else instruments)[0])

    def change_data(self, change: DataChange) -> DataLoader:
        loader = copy.copy(self)
        if self._own_source is not None:
            loader._own_source = change.change_source(self._own_source)
        return loader

    def fingerprint(self, source: Source | None = None) -> str:
        return self._resolve_source(source).fingerprint()

    def _resolve_source(self, source: Source | None) -> Source:
        return self._own_source or source or default_source()

    def field_source(
        self, source: Source | None, fields: Mapping[str, Mapping[str, str]]
    ) -> Source:
        """Return the source of the fields `{group: {column: expression}}`.

        It is the loader's own, else `source`, the handler's, else the session's.
        """
        return self._resolve_source(source)

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        fields = select_fields(self._fields, columns)
        source = self.field_source(source, fields)
        universe, filter_config = split_universe(instruments)
        filters = [*self._filters, *build_filters(filter_config)]

        def compute() -> View:
            return self._compute_view(source, universe, start_time, end_time, fields, filters)

        def find_key() -> tuple[str, dict[str, Any]] | None:
            return feature_key(
                self,
                source,
                universe=universe,
                start_time=start_time,
                end_time=end_time,
                freq=source.resolve_frequency(self.freq),
                fields=fields,
                filters=filters,
            )

        cache = current_feature_cache()
        cache_entry = None if cache is None else find_key()
        if cache is None or cache_entry is None:
            view = compute()
        else:
            # If the data changes while it is loaded, the features belong to neither key.
            view = cache.get(
                *cache_entry, compute=compute, is_current=lambda: find_key() == cache_entry
            )
        for process in self._inst_processors:
            view = process(view)
        return view

    def _compute_view(
        self,
        source: Source,
        universe: Any,
        start_time: Any,
        end_time: Any,
        fields: Mapping[str, Mapping[str, str]],
        filters: Sequence[DynamicFilter],
    ) -> View:
        rules = [e for f in filters for e in f.expressions()]
        reaches = [self.group_reach(group, expressions) for group, expressions in fields.items()]
        before, after = join_reaches([*reaches, max_reach(rules)])
        field_names = [n for group, part in fields.items() for n in self.group_fields(group, part)]
        expressions = [*(e for part in fields.values() for e in part.values()), *rules]
        bars, mask_bars = source.load_for_expressions(
            expressions,
            instruments=universe,
            fields=list(dict.fromkeys([*field_names, *expression_fields(rules)])),
            start_time=start_time,
            end_time=end_time,
            freq=self.freq,
            before=before,
            after=after,
        )
        for dynamic_filter in filters:
            bars = bars.replace(mask=dynamic_filter.members(bars, mask_bars))
        span = bars.rows(start_time, end_time)
        is_cross_section = is_cross_sectional(expressions)
        members = _find_members(bars, span) if filters or is_cross_section else bars.instruments
        if len(members) < len(bars.instruments) and not is_cross_section:
            bars = bars.select(instruments=list(members))
        mask_arguments = {} if mask_bars is None else {"mask_bars": mask_bars}
        groups = {
            g: self.compute_columns(g, bars, span, names, **mask_arguments)
            for g, names in fields.items()
        }
        rows = bars.mask[span].contiguous()
        # Members of other days have taken part in comparisons of the instruments of a day.
        return reindex_view(View(groups, rows, rows), bars.calendar[span], members)

    def compute_columns(
        self,
        group: str,
        bars: Panel,
        span: slice,
        expressions: Mapping[str, str],
        mask_bars: Panel | None = None,
    ) -> Columns:
        """Compute the columns of one group for the rows `span` of the bars.

        `mask_bars` are the bars of further instruments that the expressions refer to (by Mask).
        """
        # Rows after the dates are only needed by labels; leave them out for features.
        stop = min(len(bars.calendar), span.stop + max_reach(expressions.values())[1])
        visible_bars = bars
        if stop < len(bars.calendar):
            end = bars.calendar[stop - 1]
            visible_bars = bars.select(end=end)
            mask_bars = None if mask_bars is None else mask_bars.select(end=end)
        n = len(bars.instruments)
        # Stored by instrument, so that packing needs no copy.
        out = instrument_major(span.stop - span.start, n, len(expressions))
        return PanelColumns(
            evaluate(
                expressions,
                visible_bars,
                out=out,
                mask_bars=mask_bars,
                rows=span,
                device=current_feature_device(),
            )
        )

    def group_reach(self, group: str, expressions: Mapping[str, str]) -> tuple[int | None, int]:
        """Return the number of rows that a group's expressions need before and after the dates.

        None before means the whole history.
        """
        return max_reach(expressions.values())

    def group_fields(self, group: str, expressions: Mapping[str, str]) -> tuple[str, ...]:
        """Return the stored fields that a group's expressions read."""
        return expression_fields(expressions)


class StaticDataLoader(DataLoader):
    """Load a user's own data: a DataFrame, `{group: DataFrame or path}`, or a path.

    Frames are indexed by `(datetime, instrument)`; two-level columns are `(group, column)`. Files
    are parquet or CSV, with `datetime` and `instrument` (or a usual spelling, such as `Date` and
    `ticker`) as index or columns; frames of polars are converted. `join` selects the rows of the
    result if there are several frames. Values become float32; infinite ones need a ProcessInf.
    `date_format`, `timezone` and `decimal` say how dates and numbers are written, as in
    TableSource.

    Instruments are a list, the name of one instrument of the data, or a universe of the handler's
    source; None and "all" mean every instrument.
    """

    def __init__(
        self,
        config: Any,
        join: str = "outer",
        *,
        date_format: str | None = None,
        timezone: str | None = None,
        decimal: str = ".",
    ) -> None:
        if join not in HOW:
            raise ConfigError(unknown_name_message("join", join, HOW))
        self.config = config
        self.join = join
        self._options = ReadOptions(date_format, timezone, decimal)
        self._view: View | None = None
        self._view_fingerprint: str | None = None

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
            self._view_fingerprint = self._files_fingerprint()
            self._view = self._read()
        members = resolve_members(instruments, self._view, source)
        view = restrict_view(self._view, members, start_time, end_time)
        if columns is not None:
            groups = {g: c.keep(columns[g]) for g, c in view.groups.items() if columns.get(g)}
            view = replace(view, groups=groups)
        return check_view(view)

    def fingerprint(self, source: Source | None = None) -> str:
        """Hash the bytes of the files, or the frames, and the source of the universes if any.

        Raises DataError if a file has changed since this loader has read it.
        """
        fingerprint = self._files_fingerprint()
        if fingerprint is None:
            return super().fingerprint(source)
        if self._view_fingerprint not in (None, fingerprint):
            raise DataError(
                f"the files of {self!r} have changed since they were read (fingerprint "
                f"{self._view_fingerprint} then, {fingerprint} now): {self.config!r:.200}. Start "
                "again with the new data, and do not write to the files while they are in use."
            )
        return fingerprint if source is None else digest([fingerprint, source.fingerprint()])

    def change_data(self, change: DataChange) -> DataLoader:
        loader = copy.copy(self)
        loader._view = change.change_view(self._read() if self._view is None else self._view)
        return loader

    def _files_fingerprint(self) -> str | None:
        """Return a hash of the files and frames; None if there is no file."""
        parts = self.config if isinstance(self.config, Mapping) else {FLAT: self.config}
        if not any(isinstance(part, str | Path) for part in parts.values()):
            return None
        contents = {
            str(group): digest_text(part)
            if isinstance(part, str | Path)
            else view_fingerprint(view_from_frame(read_frame(part, self._options)))
            for group, part in parts.items()
        }
        return digest([contents, self.join, vars(self._options)])

    def _read(self) -> View:
        if isinstance(self.config, Mapping):
            frames = {str(g): read_frame(part, self._options) for g, part in self.config.items()}
            return view_from_frames(frames, self.join)
        return view_from_frame(read_frame(self.config, self._options))


class NestedDataLoader(DataLoader):
    """Join the columns of several loaders; a later loader replaces columns of the same name.

    `join`: the rows of the result; "left" uses those of the first loader. Columns are sorted by
    name, as in Qlib.
    """

    def __init__(self, dataloader_l: Sequence[Any], join: str = "left") -> None:
        if join not in HOW:
            raise ConfigError(unknown_name_message("join", join, HOW))
        if not dataloader_l:
            raise ConfigError("NestedDataLoader needs at least one loader.")
        self.dataloader_l = dataloader_l
        self.join = join
        self._loaders = [build_loader(loader) for loader in dataloader_l]

    def horizon(self, group: str = "label") -> int | None:
        horizons = [h for h in (loader.horizon(group) for loader in self._loaders) if h is not None]
        return max(horizons) if horizons else None

    def frequency(self, source: Source | None = None) -> str | None:
        return next(filter(None, (loader.frequency(source) for loader in self._loaders)), None)

    def bars_source(self, source: Source | None = None) -> Source | None:
        sources = (loader.bars_source() for loader in self._loaders)
        return next((own for own in sources if own is not None), source)

    def needs_source(self) -> bool:
        return any(loader.needs_source() for loader in self._loaders)

    def bind_train_segment(self, start: Any, end: Any) -> bool:
        are_changed = [loader.bind_train_segment(start, end) for loader in self._loaders]
        return any(are_changed)

    def check_settings(self, instruments: Any = None, source: Source | None = None) -> None:
        for loader in self._loaders:
            loader.check_settings(instruments, source)

    def change_data(self, change: DataChange) -> DataLoader:
        loader = copy.copy(self)
        loader._loaders = [each.change_data(change) for each in self._loaders]
        return loader

    def fingerprint(self, source: Source | None = None) -> str:
        return digest([loader.fingerprint(source) for loader in self._loaders])

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
        for k, loader in enumerate(self._loaders):
            # The first loader decides on the rows, so a frame without universes loads everything.
            loads_all = k > 0 and isinstance(loader, StaticDataLoader) and self.join == "left"
            loader_instruments = None if loads_all else instruments
            views.append(loader.view(loader_instruments, start_time, end_time, source=source))
        view = join_views(views, self.join)
        groups = {g: view.groups[g].keep(sorted(view.groups[g].names)) for g in sorted(view.groups)}
        return replace(view, groups=groups)


class Handler(Protocol):
    """What DataLoaderDH needs of a handler (its module imports this one)."""

    def view(self, data_key: str = "infer", *, groups: Sequence[str] | None = None) -> View:
        """Return the data of a key."""

    def bind_train_segment(self, start: Any, end: Any) -> None:
        """Set the default fit window of the processors, and the bound of explicit ones."""

    def change_data(self, change: DataChange) -> Handler:
        """Return a handler of changed data."""

    def fingerprint(self) -> str:
        """Return a hash of the data."""

    def horizon(self, group: str = "label") -> int | None:
        """Return how many rows a group looks ahead."""

    def frequency(self) -> str | None:
        """Return the frequency of the bars."""

    def bars_source(self) -> Source | None:
        """Return the source of the bars."""


class DataLoaderDH(DataLoader):
    """Load the data of other handlers: of one, or of several as groups of columns.

    `handler_config`: a handler or its configuration; with `is_group` a mapping of groups to such.
    `fetch_kwargs` choose what is read of each handler: `data_key` ("raw", "infer" or "learn", by
    default "infer") and `col_set`: "__raw" (the default: all groups), a list of groups, or columns
    without groups: those of one group, or of all ("__all"). With `is_group` the columns of each
    handler become one group; then `col_set` is a group, or "__all". Rows are those of any handler.

    The universe and the dates of the handlers stay their own: `instruments` are ignored with a
    warning, as in Qlib; dates between them can be chosen. Their processors are fitted like those of
    the dataset's own handler: by default on its train segment. Corresponds to Qlib's class of that
    name (data/dataset/loader.py).
    """

    def __init__(
        self,
        handler_config: Any,
        fetch_kwargs: Mapping[str, Any] | None = None,
        is_group: bool = False,
    ) -> None:
        self.handler_config, self.is_group = handler_config, is_group
        self.fetch_kwargs = dict(fetch_kwargs or {})
        for name in self.fetch_kwargs:
            check_name("argument in fetch_kwargs", name, ("col_set", "data_key"))
        self._col_set = self.fetch_kwargs.get("col_set", RAW_COLUMNS)
        self._data_key = self.fetch_kwargs.get("data_key", "infer")
        if is_group and not isinstance(self._col_set, str):
            raise ConfigError(
                f"col_set={self._col_set!r} with is_group=True: a group of columns is one group of "
                "its handler, such as fetch_kwargs={'col_set': 'feature'}."
            )
        if is_group and not isinstance(handler_config, Mapping):
            raise ConfigError("is_group=True expects a mapping of groups to handlers.")
        configs = handler_config if is_group else {FLAT: handler_config}
        self._handlers = {str(g): _build_handler(config) for g, config in configs.items()}
        self._train: tuple[Any, Any] | None = None

    def bind_train_segment(self, start: Any, end: Any) -> bool:
        is_changed = self._train not in (None, (start, end))
        self._train = (start, end)
        for handler in self._handlers.values():
            handler.bind_train_segment(start, end)
        return is_changed

    def horizon(self, group: str = "label") -> int | None:
        if not self.is_group:
            return self._handlers[FLAT].horizon(group)
        return self._handlers[group].horizon(self._col_set) if group in self._handlers else None

    def frequency(self, source: Source | None = None) -> str | None:
        return next(filter(None, (h.frequency() for h in self._handlers.values())), None)

    def bars_source(self, source: Source | None = None) -> Source | None:
        sources = (handler.bars_source() for handler in self._handlers.values())
        return next((own for own in sources if own is not None), source)

    def change_data(self, change: DataChange) -> DataLoader:
        loader = copy.copy(self)
        loader._handlers = {g: h.change_data(change) for g, h in self._handlers.items()}
        loader._train = None
        return loader

    def fingerprint(self, source: Source | None = None) -> str:
        return digest({g: handler.fingerprint() for g, handler in self._handlers.items()})

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        if instruments is not None:
            log.warning(
                "instruments=%.80r is ignored: the handlers of DataLoaderDH have universes of "
                "their own.",
                instruments,
            )
        views = [
            restrict_view(self._read(group, handler), None, start_time, end_time)
            for group, handler in self._handlers.items()
        ]
        return join_views(views, "outer")

    def _read(self, group: str, handler: Handler) -> View:
        """Return the groups that are read of a handler; with `is_group` as one group."""
        view, column_set = handler.view(self._data_key), self._col_set
        if column_set == RAW_COLUMNS and not self.is_group:
            return view
        if not isinstance(column_set, str):
            return replace(view, groups={name: view.group(name) for name in column_set})
        if column_set == RAW_COLUMNS and not view.is_flat:
            raise ConfigError(
                f"the handler of {group!r} has the groups {list(view.groups)}: choose one with "
                "fetch_kwargs={'col_set': ...}, or all of their columns with '__all'."
            )
        is_all = view.is_flat or column_set == ALL_COLUMNS
        names = list(view.groups) if is_all else [column_set]
        merged = view.group(names[0])
        for columns in (view.group(name) for name in names[1:]):
            merged = merged.with_columns({name: columns.column(name) for name in columns.names})
        return replace(view, groups={group: merged})


def _build_handler(config: Any) -> Handler:
    handler = config
    if isinstance(config, str | Path | Mapping):
        handler = init_instance_by_config(config, MODULE)
    if not all(callable(getattr(handler, name, None)) for name in ("view", "bind_train_segment")):
        raise ConfigError(
            f"DataLoaderDH expects a handler or its configuration, not a {type(handler).__name__}: "
            f"{handler!r:.80}"
        )
    built_handler: Handler = handler
    return built_handler


class LoaderAdapter(DataLoader):
    """Wrap any object with Qlib's `load(instruments, start_time, end_time) -> frame`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        frame: pd.DataFrame = self.loader.load(instruments, start_time, end_time)
        return frame


class ChangedLoader(DataLoader):
    """The data of another loader after a change."""

    def __init__(self, loader: DataLoader, change: DataChange) -> None:
        self.loader = loader
        self.change = change

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        dates = (start_time, end_time)
        view = self.loader.view(instruments, *dates, source=source, columns=columns)
        return self.change.change_view(view)

    def names(self) -> Names | None:
        return self.loader.names()

    def horizon(self, group: str = "label") -> int | None:
        return self.loader.horizon(group)

    def frequency(self, source: Source | None = None) -> str | None:
        return self.loader.frequency(source)

    def bars_source(self, source: Source | None = None) -> Source | None:
        return self.loader.bars_source(source)

    def needs_source(self) -> bool:
        return self.loader.needs_source()

    def fingerprint(self, source: Source | None = None) -> str:
        return digest([self.loader.fingerprint(source), repr(self.change)])


def build_loader(config: Any) -> DataLoader:
    """Build a loader from a configuration, a class name, or an object with Qlib's `load(...)`."""
    config = resolve_config(config)
    if config is None:
        raise ConfigError("a handler needs data_loader=..., or DataHandlerLP.from_df(frame).")
    if is_frame(config):
        return StaticDataLoader(config)
    if not isinstance(config, str | Mapping) and callable(getattr(config, "load", None)):
        return config if isinstance(config, DataLoader) else LoaderAdapter(config)
    loader = init_instance_by_config(config, MODULE, accept_types=DataLoader)
    return loader if isinstance(loader, DataLoader) else LoaderAdapter(loader)


# -- arguments -------------------------------------------------------------------------------------


def parse_fields(config: Any) -> dict[str, dict[str, str]]:
    """Parse a config into `{group: {column: expression}}`; without groups, the group is ""."""
    if isinstance(config, Mapping):
        if not config:
            raise ConfigError(
                "the loader's config is empty; expected {group: fields} or a list of expressions."
            )
        return {str(g): _parse_group(part, f"group {g!r}") for g, part in config.items()}
    return {FLAT: _parse_group(config, "the config")}


def _parse_group(part: Any, location: str) -> dict[str, str]:
    error_text = (
        f"{location}: expected a list of expressions, or (expressions, names); got {part!r:.80}."
    )
    if isinstance(part, str):
        part = [part]
    if not isinstance(part, Sequence) or not len(part):
        raise ConfigError(error_text)
    if isinstance(part[0], str):
        expressions, names = part, part
    elif len(part) == 2:
        expressions, names = part
    else:
        raise ConfigError(error_text)
    if len(expressions) != len(names):
        raise ConfigError(f"{location}: got {len(expressions)} expressions but {len(names)} names.")
    for expression in expressions:
        if POINT_IN_TIME.search(str(expression)):
            raise DataError(
                f"{expression!r} is a point-in-time field, which qtorch does not support. Pass "
                "such data by date as a column of a DataFrame (StaticDataLoader)."
            )
    fields = dict(zip(map(str, names), map(str, expressions), strict=True))
    if len(fields) < len(names):
        raise ConfigError(
            f"{location}: column names must be unique, got duplicates: {duplicate_names(names)}."
        )
    return fields


def select_fields(
    fields: Mapping[str, Mapping[str, str]], columns: Names | None
) -> dict[str, dict[str, str]]:
    """Keep the requested columns, and drop groups without any requested column."""
    if columns is None:
        return {g: dict(f) for g, f in fields.items()}
    selection = {g: {n: f[n] for n in columns[g]} for g, f in fields.items() if g in columns}
    return {g: f for g, f in selection.items() if f}


def _single_frequency(freq: str | Mapping[str, str] | None) -> str | None:
    if freq is None or isinstance(freq, str):
        return freq
    frequencies = set(freq.values())
    if len(frequencies) == 1:
        return frequencies.pop()
    raise ConfigError(
        f"groups with different frequencies ({dict(freq)}) are not supported; pass one freq, and "
        "build the others as expressions or as columns of a frame."
    )


def split_universe(instruments: Any) -> tuple[Any, Any]:
    """Return the universe and the filter pipe that came with it (Qlib's `D.instruments` dict)."""
    if instruments is None:
        log.info("no instruments given, loading all instruments of the source")
        return "all", None
    instruments = resolve_config(instruments)
    if isinstance(instruments, Mapping) and "market" in instruments:
        return instruments["market"], instruments.get("filter_pipe")
    return instruments, None


def resolve_members(instruments: Any, view: View, source: Source | None) -> Any:
    """Resolve `instruments` for data without universes: None for all, else names or spans."""
    if instruments is None or (isinstance(instruments, str) and instruments.lower() == "all"):
        return None
    if isinstance(instruments, str):
        if instruments in view.instruments:
            return [instruments]
        if source is not None and instruments in source.universes():
            return source.instruments(instruments)
        raise DataError(
            f"the data has no universe {instruments!r}, because frames have no universes. Pass a "
            "list of instruments, None for all, or a source=... that has this universe."
        )
    if not isinstance(instruments, Iterable):
        raise ConfigError(not_text_message(instruments, "universe"))
    return instruments


# -- columns ---------------------------------------------------------------------------------------


def _find_members(bars: Panel, span: slice) -> pd.Index:
    """Return the instruments that are members on at least one of the rows."""
    is_member = bars.mask[span].any(0).cpu().numpy()
    if not is_member.any():
        raise DataError(
            "the universe or its filter_pipe excludes every instrument on every day; relax its "
            "rules, or choose other dates."
        )
    return bars.instruments[is_member]
