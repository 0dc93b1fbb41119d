"""Conversion between users' frames and views."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.tables import read_csv
from qtorch.core.trust import load_pickle
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import NAMES, Panel
from qtorch.data.panel.view import FLAT, View, join_views


def view_from_frame(frame: pd.DataFrame) -> View:
    """Build a view from a `(datetime, instrument)` frame; two-level columns are `(group, column)`.

    Raises DataError for a frame that `Panel.from_frame` refuses: duplicate rows, dates in
    descending order, time zones, columns that are not numeric.
    """
    levels = frame.columns.nlevels
    if levels > 2:
        raise DataError(
            f"the frame's columns have {levels} levels; expected (group, column) or one level."
        )
    panel = Panel.from_frame(_set_index(frame))
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
        columns_by_group[group] = PanelColumns(part)
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


def read_frame(data: Any) -> pd.DataFrame:
    """Return a frame as it is, or read it from a parquet or CSV file (pickles only if trusted)."""
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pd.Series):
        return data.to_frame()
    if not isinstance(data, str | Path):
        raise ConfigError(f"expected a DataFrame or the path of a file, got {type(data).__name__}.")
    path = Path(data).expanduser()
    if not path.is_file():
        raise DataError(f"cannot read a frame: there is no file {str(path)!r}.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _set_index(pd.read_parquet(path))
    if suffix == ".csv" or path.name.lower().endswith(".csv.gz"):
        return _set_index(read_csv(path, [NAMES[1]]))
    if suffix in (".pkl", ".pickle"):
        frame = load_pickle(path)
        if isinstance(frame, pd.DataFrame):
            return frame
        raise DataError(f"{path} contains a {type(frame).__name__}, expected a DataFrame.")
    raise DataError(f"{path.name}: expected a .parquet or .csv file.")


def _set_index(frame: pd.DataFrame) -> pd.DataFrame:
    """Set `datetime` and `instrument` as the frame's index if they are columns."""
    if isinstance(frame.index, pd.MultiIndex) and set(frame.index.names) == set(NAMES):
        return frame
    if isinstance(frame.index, pd.MultiIndex) and frame.index.names == [None, None]:
        return frame.rename_axis(list(NAMES))
    flat = frame.reset_index() if frame.index.name in NAMES else frame
    if not set(NAMES) <= set(flat.columns):
        raise DataError(
            f"expected an index or columns {NAMES}, got columns {list(frame.columns)[:8]} and "
            f"index {list(frame.index.names)}. Rename them, or frame.set_index([...])."
        )
    dates = pd.to_datetime(flat[NAMES[0]])
    return flat.assign(**{NAMES[0]: dates}).set_index(list(NAMES))
