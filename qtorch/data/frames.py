"""Users' frames as views, and views as frames."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.trust import load_pickle
from qtorch.data.columns import PanelColumns
from qtorch.data.join import joined
from qtorch.data.panel import NAMES, Panel
from qtorch.data.processor.base import FLAT
from qtorch.data.view import View


def view_of_frame(frame: pd.DataFrame) -> View:
    """A view of a `(datetime, instrument)` frame; two-level columns are `(group, column)`.

    Raises DataError for a frame that `Panel.from_frame` refuses: doubled rows, dates that do not
    ascend, time zones, columns that are not numeric.
    """
    levels = frame.columns.nlevels
    if levels > 2:
        raise DataError(
            f"the frame's columns have {levels} levels; expected (group, column) or one level."
        )
    if not isinstance(frame.index, pd.MultiIndex) or set(frame.index.names) != set(NAMES):
        frame = _indexed(frame)
    panel = Panel.from_frame(frame)
    if levels == 1:
        return View({FLAT: PanelColumns(panel)}, panel.mask, panel.mask)
    groups: dict[str, list[int]] = {}
    for k, group in enumerate(frame.columns.get_level_values(0)):
        groups.setdefault(str(group), []).append(k)
    names = [str(n) for n in frame.columns.get_level_values(1)]
    by_field = panel.values.permute(2, 0, 1)
    made = {}
    for group, at in groups.items():
        adjacent = at == list(range(at[0], at[-1] + 1))
        values = by_field[at[0] : at[-1] + 1] if adjacent else by_field[at]
        part = Panel(
            values.permute(1, 2, 0),
            panel.calendar,
            panel.instruments,
            [names[k] for k in at],
            mask=panel.mask,
            spans=panel.spans,
        )
        made[group] = PanelColumns(part)
    return View(made, panel.mask, panel.mask)


def view_of_frames(frames: Mapping[str, pd.DataFrame], how: str) -> View:
    """A view of several frames, each one group's."""
    if not frames:
        raise ConfigError("no frames given; expected {group: frame or path}.")
    views = []
    for group, frame in frames.items():
        if frame.columns.nlevels != 1:
            raise DataError(f"the frame of group {group!r} must have one level of columns.")
        view = view_of_frame(frame)
        views.append(View({group: view.groups[FLAT]}, view.rows, view.history))
    return joined(views, how)


def flat_or_grouped(view: View, **selection: Any) -> pd.DataFrame:
    """The view's frame; data without groups has one level of columns."""
    frame = view.frame(**selection)
    return frame.droplevel(0, axis=1) if set(view.groups) == {FLAT} else frame


def fingerprint_of(view: View) -> str:
    """A hash of the view's rows, names and values."""
    found = hashlib.sha256("\n".join(view.instruments).encode())
    found.update(view.calendar.asi8.tobytes())
    found.update(np.packbits(view.rows.cpu().numpy()).tobytes())
    for group, columns in view.groups.items():
        for name in columns.names:
            found.update(f"{group}/{name}".encode())
            found.update(columns.column(name).contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:32]


def read_frame(given: Any) -> pd.DataFrame:
    """A frame as it is, or read from a parquet or CSV file (a pickle by the trust rule)."""
    if isinstance(given, pd.DataFrame):
        return given
    if isinstance(given, pd.Series):
        return given.to_frame()
    if not isinstance(given, str | Path):
        raise ConfigError(
            f"expected a DataFrame or the path of a file, got {type(given).__name__}."
        )
    path = Path(given).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r} to read a frame from.")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _indexed(pd.read_parquet(path))
    if kind == ".csv" or path.name.lower().endswith(".csv.gz"):
        return _indexed(pd.read_csv(path))
    if kind in (".pkl", ".pickle"):
        frame = load_pickle(path)
        if isinstance(frame, pd.DataFrame):
            return frame
        raise DataError(f"{path} holds a {type(frame).__name__}, not a DataFrame.")
    raise DataError(f"{path.name}: expected a .parquet or .csv file.")


def _indexed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `datetime` and `instrument` as its index, where they are columns."""
    if isinstance(frame.index, pd.MultiIndex) and set(frame.index.names) == set(NAMES):
        return frame
    if isinstance(frame.index, pd.MultiIndex) and frame.index.names == [None, None]:
        return frame.rename_axis(list(NAMES))
    flat = frame.reset_index() if frame.index.name in NAMES else frame
    if not set(NAMES) <= set(flat.columns):
        raise DataError(
            f"expected an index or columns {NAMES}, found columns {list(frame.columns)[:8]} and "
            f"index {list(frame.index.names)}. Rename them, or frame.set_index([...])."
        )
    dates = pd.to_datetime(flat[NAMES[0]])
    return flat.assign(**{NAMES[0]: dates}).set_index(list(NAMES))
