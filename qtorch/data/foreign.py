"""Datasets that are not qtorch's: anything with Qlib's `prepare`, a TSDataSampler, a frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.columns import PanelColumns
from qtorch.data.foreign_segments import check_dates, purged_days
from qtorch.data.gather import DensePacked, infinite_message
from qtorch.data.panel import NAMES, Panel, normalise_calendar
from qtorch.data.sample_set import Samples
from qtorch.data.segment_samples import build_samples, finite_labels, labelled, say_samples
from qtorch.data.view import View

GROUPS = ("feature", "label")
ITEMS_AT_ONCE = 4096


def as_samples(
    dataset: Any,
    segment: str | slice | None = None,
    *,
    data_key: str = "infer",
    step_len: int = 1,
    fill: str = "ffill+bfill",
    num_labels: int | None = None,
    raw_label: bool = True,
    purge: bool | None = None,
    horizon: int | None = None,
) -> Samples:
    """Samples of any object with Qlib's `prepare(segment, col_set=, data_key=)`, or of a frame.

    `prepare` may give a frame with columns `(group, name)` for the groups feature and label
    (DatasetH), or windows (TSDatasetH's TSDataSampler, or anything with `get_index()`, a length
    and access by a list of positions). Windows are filled by `fill`, as Qlib's own models set
    it, whatever the sampler was left at. A window does not tell where its features end: the
    labels are its last columns, `num_labels` of them, by default as many as the dataset's
    handler has (one, if it does not say).

    A plain frame is its own dataset: `segment` is None or a slice of dates, and `step_len`
    windows look back inside the frame. Unprocessed labels come from the dataset's handler, if
    it has one.

    `purge` (None: for the key "learn") leaves out the last `horizon` days of a segment that
    another one follows: their labels reach into it. `horizon` is given, else the dataset's
    attribute of that name, else read from the label's expression where its handler shows it (as
    Qlib's QlibDataLoader does); where nothing tells it, nothing is purged, and the log says so.

    Raises DataError where `prepare` gives something else, or nothing; ConfigError for segments that
    overlap (unless the dataset's `allow_overlap` is true), and a `purge=True` that cannot be done.
    """
    if isinstance(dataset, pd.DataFrame):
        _refuse_purge(purge, horizon)
        return _of_frame(dataset, _as_slice(segment), data_key, step_len, fill)
    if not callable(getattr(dataset, "prepare", None)):
        raise DataError(
            f"{type(dataset).__name__} is no dataset: it has neither samples(...) nor Qlib's "
            "prepare(segment, col_set=..., data_key=...). Give a DatasetH, a TSDatasetH, or a "
            "frame with (feature, label) columns."
        )
    if data_key == "learn":
        check_dates(dataset)
    wanted = data_key == "learn" if purge is None else purge
    gone = purged_days(dataset, segment, horizon, strict=purge is True) if wanted else 0
    found = dataset.prepare(segment, col_set=list(GROUPS), data_key=data_key)
    if isinstance(found, pd.DataFrame):
        samples = _of_frame(found, slice(None), data_key, step_len, fill, segment, gone)
    elif hasattr(found, "get_index") and hasattr(found, "__getitem__"):
        labels = _num_labels(dataset) if num_labels is None else num_labels
        samples = _of_windows(found, labels, fill, segment, data_key, gone)
    else:
        raise DataError(
            f"{type(dataset).__name__}.prepare gave a {type(found).__name__}; expected a frame "
            "with (feature, label) columns or windows with get_index()."
        )
    if raw_label:
        samples.raw_label = _raw_label(dataset, segment, samples.index)
    return samples


# -- frames ------------------------------------------------------------------------------------


def view_of_frame(frame: pd.DataFrame) -> View:
    """A view of a `(datetime, instrument)` frame with columns `(group, name)`."""
    if frame.columns.nlevels != 2:
        raise DataError(
            f"expected columns (group, name) with the groups {GROUPS}, got {frame.columns.nlevels} "
            "level(s). Mend it with pd.concat({'feature': x, 'label': y}, axis=1)."
        )
    groups = list(dict.fromkeys(frame.columns.get_level_values(0)))
    if GROUPS[0] not in groups:
        raise DataError(unknown_name("group of columns", GROUPS[0], [str(g) for g in groups]))
    ordered = frame.copy(deep=False)
    ordered.columns = pd.Index(["/".join(map(str, pair)) for pair in frame.columns.tolist()])
    panel = Panel.from_frame(ordered.sort_index())
    columns: dict[str, PanelColumns] = {}
    for group in groups:
        part = panel.select(fields=[f"{group}/{name}" for name in frame[group].columns])
        named = Panel(
            part.values,
            panel.calendar,
            panel.instruments,
            [str(name) for name in frame[group].columns],
            mask=panel.mask,
            spans=panel.spans,
        )
        columns[str(group)] = PanelColumns(named)
    return View(columns, rows=panel.mask, history=panel.mask)


def _of_frame(
    frame: pd.DataFrame,
    dates: slice,
    data_key: str,
    step_len: int,
    fill: str,
    segment: str | slice | None = None,
    purged_days: int = 0,
) -> Samples:
    name = str(segment or "frame")
    if not len(frame):
        raise DataError(f"{name} holds no sample: the frame is empty.")
    return build_samples(
        view_of_frame(frame),
        start=dates.start,
        end=dates.stop,
        name=name,
        step_len=step_len,
        fill=fill,
        learn=data_key == "learn",
        horizon=purged_days,
        later_starts=[pd.Timestamp.max],  # the frame ends with its segment
    )


def _refuse_purge(purge: bool | None, horizon: int | None) -> None:
    if purge or horizon is not None:
        raise ConfigError(
            "purge and horizon are for segments that others follow, and a plain frame has no "
            "segments: end its dates earlier."
        )


def _as_slice(segment: str | slice | None) -> slice:
    if segment is None:
        return slice(None)
    if isinstance(segment, slice):
        return segment
    raise DataError(
        f"a plain frame has no segment {segment!r}; give a slice of dates, or a DatasetH with "
        "segments."
    )


# -- windows -----------------------------------------------------------------------------------


def _of_windows(
    windows: Any,
    num_labels: int,
    fill: str,
    segment: str | slice | None,
    data_key: str,
    purged_days: int = 0,
) -> Samples:
    index = windows.get_index()
    dates = normalise_calendar(index.get_level_values(NAMES[0]))
    names = index.get_level_values(NAMES[1]).astype(str)
    if not len(index):
        raise DataError(f"{segment} holds no sample: prepare gave no windows.")
    instruments = pd.Index(np.unique(names.to_numpy(dtype=object)), dtype="str")
    calendar = pd.DatetimeIndex(np.unique(dates))
    date, who = calendar.get_indexer(dates), instruments.get_indexer(names)
    order = np.lexsort((who, date))
    if all(hasattr(windows, name) for name in ("data_arr", "idx_df", "step_len")):
        values, exists, place = _dense(windows, dates, names)
        step_len = int(windows.step_len)
    else:
        if callable(getattr(windows, "config", None)):
            windows.config(fillna_type=fill)
        values = _windows_of(windows, len(index))
        exists, step_len = None, int(values.shape[1])
        place = (torch.full((len(index),), step_len - 1), torch.arange(len(index)))
    count = values.shape[2] - num_labels
    if count < 1:
        raise DataError(
            f"the windows have {values.shape[2]} columns of which {num_labels} are labels; "
            "no feature is left."
        )
    packed = _finite(DensePacked(values[:, :, :count].clone(), history=exists, own=True))
    chosen = torch.as_tensor(order[date[order] < len(calendar) - purged_days])
    notes = {"purged": len(order) - len(chosen)}
    if not len(chosen):
        raise DataError(f"{segment} holds no sample: all {len(order)} are purged.")
    target = values[place[1], place[0], count:][chosen]
    labels = [f"label{k}" for k in range(num_labels)]
    if data_key == "learn":
        known = labelled(str(segment), labels, finite_labels(labels, target, learn=True))
        notes["unlabelled"] = int((~known).sum())
        chosen, target = chosen[known], target[known]
    say_samples(str(segment), len(chosen), notes, purged_days)
    place = (place[0][chosen], place[1][chosen])
    return Samples(
        packed,
        torch.as_tensor(date)[chosen],
        torch.as_tensor(who)[chosen],
        calendar=calendar,
        instruments=instruments,
        feature_names=[f"feature{k}" for k in range(count)],
        label_names=labels,
        target=target if labels else None,
        step_len=step_len,
        fill=fill,
        place=place,
        notes=notes,
        horizon=purged_days or None,
    )


def _finite(packed: DensePacked) -> DensePacked:
    bad = [f"column {k}" for k, wrong in enumerate(packed.infinite().tolist()) if wrong]
    if bad:
        raise DataError(infinite_message(bad, "features"))
    return packed


def _dense(
    sampler: Any, dates: pd.DatetimeIndex, names: pd.Index
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A TSDataSampler's rows as `[N, D, K]`, which exist `[D, N]`, and the samples' places."""
    table = sampler.idx_df
    at = table.to_numpy(dtype=np.float64, na_value=np.nan)
    exists = ~np.isnan(at)
    rows = np.where(exists, at, len(sampler.data_arr) - 1).astype(np.int64)
    values = np.asarray(sampler.data_arr, dtype=np.float32)[rows.T]
    calendar = normalise_calendar(table.index)
    place = (
        torch.as_tensor(calendar.get_indexer(dates)),
        torch.as_tensor(table.columns.astype(str).get_indexer(names)),
    )
    values[~exists.T] = np.nan
    return torch.from_numpy(values), torch.as_tensor(exists), place


def _windows_of(windows: Any, count: int) -> Tensor:
    """`[S, T, K]` by item access: what nothing more is known of is copied out once."""
    parts = []
    for first in range(0, count, ITEMS_AT_ONCE):
        part = windows[list(range(first, min(count, first + ITEMS_AT_ONCE)))]
        parts.append(torch.as_tensor(np.asarray(part, dtype=np.float32)))
    values = torch.cat(parts)
    if values.dim() != 3:
        raise DataError(
            f"windows by a list of positions must be [samples, steps, columns], got "
            f"{tuple(values.shape)}."
        )
    return values


# -- labels ------------------------------------------------------------------------------------


def _num_labels(dataset: Any) -> int:
    get_cols = getattr(getattr(dataset, "handler", None), "get_cols", None)
    return len(get_cols(GROUPS[1])) if callable(get_cols) else 1


def _raw_label(dataset: Any, segment: Any, index: pd.MultiIndex) -> Tensor | None:
    """The unprocessed labels `[S, Q]`, where the dataset's handler can give them."""
    handler = getattr(dataset, "handler", None)
    fetch = getattr(handler, "fetch", None)
    if not callable(fetch) or getattr(handler, "drop_raw", False):
        return None
    segments: Mapping[str, Sequence[Any]] = getattr(dataset, "segments", {})
    dates = segment
    if not isinstance(segment, slice):
        if segment not in segments:
            return None
        dates = slice(*segments[segment])
    frame = fetch(dates, col_set=GROUPS[1], data_key="raw")
    frame = frame.set_axis(
        pd.MultiIndex.from_arrays(
            [
                normalise_calendar(frame.index.get_level_values(NAMES[0])),
                frame.index.get_level_values(NAMES[1]).astype(str),
            ],
            names=list(NAMES),
        ),
        axis=0,
    )
    values = frame.reindex(index).to_numpy(dtype=np.float32, copy=True)
    values[np.isinf(values)] = np.nan
    return torch.as_tensor(values)
