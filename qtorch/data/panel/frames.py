"""Conversion between users' frames and views."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.dates import parse_dates
from qtorch.core.errors import ConfigError, DataError, DuplicateRowError
from qtorch.core.session import resolve_path
from qtorch.core.tables import (
    as_pandas,
    find_column,
    has_instrument_columns,
    index_to_columns,
    is_table,
    read_table,
    text_names,
)
from qtorch.core.trust import load_pickle
from qtorch.data.panel.column_names import DATE_COLUMNS, INSTRUMENT_COLUMNS
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import NAMES, Panel, raise_duplicate
from qtorch.data.panel.view import FLAT, View, join_views
from qtorch.data.panel.window_columns import StoredWindowColumns, count_window_steps

LEVEL_COLUMNS = (*DATE_COLUMNS, *INSTRUMENT_COLUMNS)


@dataclass(frozen=True)
class ReadOptions:
    """How dates and numbers are written; see `qtorch.core.dates.parse_dates`."""

    date_format: str | None = None
    timezone: str | None = None
    decimal: str = "."

    def parse_dates(self, values: Any, context: Iterable[str] = ()) -> pd.DatetimeIndex:
        """Parse a column of dates."""
        dates = parse_dates(
            values, date_format=self.date_format, timezone=self.timezone, context=context
        )
        return dates.rename(NAMES[0])


def view_from_frame(frame: pd.DataFrame) -> View:
    """Build a view from a `(datetime, instrument)` frame; two-level columns are `(group, column)`.

    Raises DataError for a frame that `Panel.from_frame` refuses: duplicate rows, time zones,
    columns that are not numeric.
    """
    levels = frame.columns.nlevels
    if levels > 2:
        raise DataError(
            f"the frame's columns have {levels} levels; expected (group, column) or one level."
        )
    panel = Panel.from_frame(index_frame(frame))
    if levels == 1:
        return View({FLAT: PanelColumns(panel)}, panel.mask, panel.mask)
    groups: dict[str, list[int]] = {}
    for k, group in enumerate(frame.columns.get_level_values(0)):
        groups.setdefault(str(group), []).append(k)
    names = [str(n) for n in frame.columns.get_level_values(1)]
    by_field = panel.values.permute(2, 0, 1)
    columns_by_group = {}
    for group, positions in groups.items():
        adjacent = positions == list(range(positions[0], positions[-1] + 1))
        values = by_field[positions[0] : positions[-1] + 1] if adjacent else by_field[positions]
        part = panel.replace(values=values.permute(1, 2, 0), fields=[names[k] for k in positions])
        is_window = count_window_steps(part.fields) > 1
        columns_by_group[group] = StoredWindowColumns(part) if is_window else PanelColumns(part)
    return View(columns_by_group, panel.mask, panel.mask)


def view_from_frames(frames: Mapping[str, pd.DataFrame], join: str) -> View:
    """Build a view from several frames, one per group."""
    if not frames:
        raise ConfigError("got no frames; expected {group: frame or path}.")
    views = []
    for group, frame in frames.items():
        if frame.columns.nlevels != 1:
            raise DataError(f"the columns of group {group!r}'s frame must have one level.")
        view = view_from_frame(frame)
        views.append(View({group: view.groups[FLAT]}, view.rows, view.history))
    return join_views(views, join)


def view_to_frame(view: View, **selection: Any) -> pd.DataFrame:
    """Convert a view to a frame; data without groups has one level of columns."""
    frame = view.frame(**selection)
    return frame.droplevel(0, axis=1) if view.is_flat else frame


def view_fingerprint(view: View) -> str:
    """Return a hash of the view's rows, names and values."""
    hasher = hashlib.sha256("\n".join(view.instruments).encode())
    hasher.update(view.calendar.asi8.tobytes())
    hasher.update(np.packbits(view.rows.cpu().numpy()).tobytes())
    for group, columns in view.groups.items():
        for name in columns.names:
            hasher.update(f"{group}/{name}".encode())
            hasher.update(columns.column(name).contiguous().cpu().numpy().tobytes())
    return hasher.hexdigest()[:32]


def read_frame(data: Any, options: ReadOptions | None = None) -> pd.DataFrame:
    """Return a `(datetime, instrument)` frame from a frame, or from a parquet or CSV file.

    Pickles are read only if they are trusted. Frames of polars and similar libraries become
    pandas frames.
    """
    options = options or ReadOptions()
    if not isinstance(data, str | Path):
        return index_frame(as_pandas(data), options)
    path = resolve_path(data)
    if not path.is_file():
        raise DataError(f"cannot read a frame: there is no file {str(path)!r}.")
    if path.suffix.lower() in (".pkl", ".pickle"):
        frame = load_pickle(path)
        if isinstance(frame, pd.DataFrame):
            return index_frame(frame, options)
        raise DataError(f"{path} contains a {type(frame).__name__}, expected a DataFrame.")
    if not is_table(path):
        raise DataError(f"{path.name}: expected a .parquet or .csv file.")
    names = [INSTRUMENT_COLUMNS, DATE_COLUMNS]
    table = read_table(path, names, decimal=options.decimal, keeps_index=True)
    try:
        frame = index_frame(table, options)
        if frame.index.has_duplicates:
            raise_duplicate(frame.index, "")
    except DuplicateRowError as error:
        raise error.with_advice(f"keep one of each in {path}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return frame


def index_frame(frame: pd.DataFrame, options: ReadOptions | None = None) -> pd.DataFrame:
    """Return a frame with the index `(datetime, instrument)`, its dates parsed and naive.

    Both may be index levels or columns, with their usual spellings in any case. An index of two
    levels without names is taken as dates and instruments, in the order that its types show.
    Raises DataError for other frames, and for duplicate rows if both are not index levels.
    """
    options = options or ReadOptions()
    if isinstance(frame.index, pd.MultiIndex) and frame.index.nlevels == 2:
        frame = frame.rename_axis(index=_level_names(frame.index))
        if set(frame.index.names) == set(NAMES):
            return _parse_levels(frame, options)
    elif frame.index.name is not None and not find_column([str(frame.index.name)], LEVEL_COLUMNS):
        frame = frame.reset_index(drop=True)  # neither dates nor instruments
    is_flat = frame.columns.nlevels == 1 or has_instrument_columns(frame)
    table = index_to_columns(frame) if is_flat else frame
    columns = list(table.columns) if is_flat else []
    date_column = find_column(columns, DATE_COLUMNS)
    instrument_column = find_column(columns, INSTRUMENT_COLUMNS)
    if date_column is None or instrument_column is None:
        raise DataError(
            f"expected an index or columns {NAMES}, got columns {list(frame.columns)[:8]} and "
            f"index {list(frame.index.names)}. Rename them, or frame.set_index([...])."
        )
    index = pd.MultiIndex.from_arrays(
        [
            options.parse_dates(table[date_column]),
            text_names(table[instrument_column]),
        ],
        names=list(NAMES),
    )
    if index.has_duplicates:
        raise_duplicate(index, _duplicate_advice(frame, [date_column, instrument_column]))
    return table.drop(columns=[date_column, instrument_column]).set_index(index)


def _duplicate_advice(frame: pd.DataFrame, keys: Sequence[str]) -> str:
    """Say how to drop duplicates from a user's frame, whose keys are columns or index levels."""
    if has_instrument_columns(frame):
        return "keep one row of each date with frame[~frame.index.duplicated()]"
    names = [str(column) for column in frame.columns]
    if all(key in names for key in keys):
        prefix = "frame"
    elif frame.index.names == [None]:  # an index of dates, which is called datetime here
        prefix = "frame.rename_axis('datetime').reset_index()"
    else:
        prefix = "frame.reset_index()"
    return f"keep one of each with {prefix}.drop_duplicates({list(keys)})"


def _level_names(index: pd.MultiIndex) -> list[Any]:
    """Return `datetime` and `instrument` for levels with usual spellings, or without names."""
    if index.names == [None, None]:
        kinds = [pd.api.types.is_datetime64_any_dtype(level.dtype) for level in index.levels]
        return list(NAMES[::-1] if kinds == [False, True] else NAMES)
    dates = find_column(map(str, index.names), DATE_COLUMNS)
    instruments = find_column(map(str, index.names), INSTRUMENT_COLUMNS)
    names = {dates: NAMES[0], instruments: NAMES[1]}
    levels = [names.get(str(name), name) for name in index.names]
    if None in levels and len(other := set(NAMES) - set(levels)) == 1:
        levels[levels.index(None)] = other.pop()  # the level beside the named one
    return levels


def _parse_levels(frame: pd.DataFrame, options: ReadOptions) -> pd.DataFrame:
    """Parse the dates of the index, unless they are naive timestamps already."""
    index: Any = frame.index
    k = index.names.index(NAMES[0])
    level = index.levels[k]
    names = index.levels[1 - k]
    is_parsed = isinstance(level, pd.DatetimeIndex) and level.tz is None
    if is_parsed and pd.api.types.is_string_dtype(names.dtype):
        return frame
    dates = options.parse_dates(pd.Series(level))
    texts = pd.Index([*text_names(names), None], dtype="str")
    levels = [dates.insert(len(dates), pd.NaT)[index.codes[k]], texts[index.codes[1 - k]]]
    parsed = pd.MultiIndex.from_arrays(levels[::-1] if k else levels, names=index.names)
    return frame.set_axis(parsed, axis=0)
