"""Row and column selection of Qlib's `fetch`: by date, instrument or index, and by column group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.data.panel.frames import view_to_frame
from qtorch.data.panel.panel import NAMES
from qtorch.data.panel.view import View

CS_ALL = "__all"
CS_RAW = "__raw"


def fetch_frame(
    view: View,
    selector: Any = slice(None),
    level: str | int | None = "datetime",
    col_set: str | Sequence[str] = CS_ALL,
) -> pd.DataFrame:
    """Select rows and columns of a view as a frame, as Qlib's handlers return them.

    `selector`: a date (a string may name a month or a year), a slice or pair of dates, both
    inclusive, or an index of dates; with `level` "instrument" the same for instruments; with
    `level` None whatever `frame.loc` accepts.
    """
    groups = select_groups(view, col_set)
    span = _date_span(selector) if _is_date_level(level) else None
    if span is None:
        frame = _select_rows(view_to_frame(view, groups=groups), selector, level)
    else:
        frame = view_to_frame(view, start=span[0], end=span[1], groups=groups)
    if frame.columns.nlevels == 1 or not isinstance(col_set, str) or col_set == CS_RAW:
        return frame
    return frame.droplevel(0, axis=1)


def select_column_set(frame: pd.DataFrame, col_set: str | Sequence[str]) -> pd.DataFrame:
    """Select a column set from a frame whose columns may be `(group, name)`."""
    if frame.columns.nlevels == 1 or col_set == CS_RAW:
        return frame
    if col_set == CS_ALL:
        return frame.droplevel(0, axis=1)
    selection: pd.DataFrame = frame[col_set if isinstance(col_set, str) else list(col_set)]
    return selection


def squeeze_frame(frame: pd.DataFrame, selector: Any, level: str | int | None) -> Any:
    """Reduce one column or one row to a series, and drop a single date's level (as Qlib does)."""
    rows, columns = frame.shape
    if columns == 1:
        out: Any = frame.iloc[0, 0] if rows == 1 else frame.iloc[:, 0]
    else:
        out = frame.iloc[0] if rows == 1 else frame
    if rows > 1 and isinstance(selector, str | pd.Timestamp):
        return out.reset_index(level=level, drop=True)
    return out


def select_groups(view: View, col_set: str | Sequence[str]) -> list[str] | None:
    """Return the groups that a column set names; None for all groups."""
    if view.is_flat or (isinstance(col_set, str) and col_set in (CS_ALL, CS_RAW)):
        return None
    groups = [col_set] if isinstance(col_set, str) else list(col_set)
    for group in groups:
        if group not in view.groups:
            choices = [*view.groups, CS_ALL, CS_RAW]
            raise ConfigError(unknown_name_message("column set (group)", str(group), choices))
    return groups


def column_set_names(view: View, col_set: str | Sequence[str]) -> list[Any]:
    """Return the columns of a column set: names, or `(group, name)` for several groups."""
    groups = select_groups(view, col_set)
    pairs = [
        (g, n) for g in (view.groups if groups is None else groups) for n in view.groups[g].names
    ]
    has_one_level = view.is_flat or (isinstance(col_set, str) and col_set != CS_RAW)
    return [n for _, n in pairs] if has_one_level else pairs


def _is_date_level(level: str | int | None) -> bool:
    if level not in (None, 0, 1, *NAMES):
        raise ConfigError(unknown_name_message("level", str(level), NAMES))
    return level in (NAMES[0], 0)


def _date_span(selector: Any) -> tuple[Any, Any] | None:
    """Return the first and last date of a selector, or None if it is not a span of dates."""
    if isinstance(selector, tuple | list) and len(selector) == 2:
        selector = slice(*selector)
    if isinstance(selector, slice):
        if selector.step is not None:
            raise ConfigError("a slice of dates cannot have a step.")
        return selector.start, selector.stop
    if isinstance(selector, str | pd.Timestamp) or hasattr(selector, "isoformat"):
        return selector, selector
    return None


def _select_rows(frame: pd.DataFrame, selector: Any, level: str | int | None) -> pd.DataFrame:
    if isinstance(selector, slice) and selector == slice(None):
        return frame
    if level is None or isinstance(selector, pd.MultiIndex):
        selection: pd.DataFrame = frame.loc(axis=0)[selector]
        return selection
    try:
        if _is_date_level(level):
            dates = pd.DatetimeIndex([selector] if pd.api.types.is_scalar(selector) else selector)
            return frame[frame.index.get_level_values(0).isin(dates)]
        if isinstance(selector, slice):
            return frame.loc[(slice(None), selector), :]
        names = [selector] if isinstance(selector, str) else list(selector)
        return frame[frame.index.get_level_values(1).isin(names)]
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot select rows by {selector!r:.80}: {error}") from error
