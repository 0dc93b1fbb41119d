"""Samples from Qlib datasets: anything with Qlib's `prepare`, a TSDataSampler, or a frame."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import ConfigError, DataError, ExpressionError, unknown_name_message
from qtorch.data.dataset.samples import (
    Samples,
    build_samples,
    check_segments,
    finite_labels,
    label_mask,
    log_samples,
)
from qtorch.data.expression import reach
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.panel.gather import DensePackedColumns
from qtorch.data.panel.infinite import check_processed_columns
from qtorch.data.panel.panel import NAMES, normalise_calendar

log = logging.getLogger(__name__)

GROUPS = ("feature", "label")
ITEMS_AT_ONCE = 4096  # windows that are read of a sampler by one access


def get_samples(
    dataset: Any,
    segment: str | slice,
    *,
    data_key: str = "infer",
    purge: bool | None = None,
    **options: Any,
) -> Samples:
    """Return the samples of a dataset's segment, for any kind of dataset.

    A qtorch dataset has a method `samples`; any other object with Qlib's `prepare`, and a plain
    frame, is converted by `as_samples`. `purge` None means that samples for
    learning are purged by the label's horizon (if it is known) and those for inference are not.
    """
    samples_method = getattr(dataset, "samples", None)
    if callable(samples_method):
        should_purge = (data_key == "learn") if purge is None else purge
        samples: Samples = samples_method(segment, data_key=data_key, purge=should_purge, **options)
        return samples
    return as_samples(dataset, segment, data_key=data_key, purge=purge, **options)


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
    """Build samples from an object with Qlib's `prepare(segment, col_set=, data_key=)` or a frame.

    `prepare` may return a frame with columns `(group, name)` for the groups feature and label
    (DatasetH), or windows (TSDatasetH's TSDataSampler, or anything with `get_index()`, a length
    and access by a list of positions). Windows are filled by `fill`, as Qlib's own models do,
    whatever the sampler's current setting. A window does not show where its features end: the
    labels are its last `num_labels` columns, by default as many as the dataset's handler has (one
    if the handler does not tell).

    A plain frame is its own dataset: `segment` is None or a slice of dates, and windows of
    `step_len` rows look back inside the frame. Raw labels come from the dataset's handler, if it
    has one.

    `purge` (None: only for the key "learn") leaves out the last `horizon` days of a segment that
    another one follows, because their labels reach into it. `horizon` defaults to the dataset's
    attribute of that name, else it is read from the label's expression if the handler shows it (as
    Qlib's QlibDataLoader does); if the horizon is unknown, nothing is purged and a warning is
    logged.

    Raises DataError if `prepare` returns something else or nothing; ConfigError for overlapping
    segments (unless the dataset's `allow_overlap` is true) and if `purge=True` is impossible.
    """
    if isinstance(dataset, pd.DataFrame):
        dates = _plain_frame_dates(segment, purge, horizon)
        return _samples_from_frame(dataset, "frame", data_key, step_len, fill, dates=dates)
    if not callable(getattr(dataset, "prepare", None)):
        raise DataError(
            f"{type(dataset).__name__} is not a dataset: it has neither samples(...) nor Qlib's "
            "prepare(segment, col_set=..., data_key=...). Pass a DatasetH, a TSDatasetH, or a "
            "frame with (feature, label) columns."
        )
    if data_key == "learn" and not getattr(dataset, "allow_overlap", False):
        check_segments(_segment_spans(dataset))
    should_purge = data_key == "learn" if purge is None else purge
    num_purged_days = (
        count_purged_days(dataset, segment, horizon, strict=purge is True) if should_purge else 0
    )
    data = dataset.prepare(segment, col_set=list(GROUPS), data_key=data_key)
    if isinstance(data, pd.DataFrame):
        samples = _samples_from_frame(
            data, str(segment), data_key, step_len, fill, num_purged_days=num_purged_days
        )
    elif hasattr(data, "get_index") and hasattr(data, "__getitem__"):
        labels = _num_labels(dataset) if num_labels is None else num_labels
        samples = _samples_from_windows(data, labels, fill, str(segment), data_key, num_purged_days)
    else:
        raise DataError(
            f"{type(dataset).__name__}.prepare returned a {type(data).__name__}; expected a frame "
            "with (feature, label) columns or windows with get_index()."
        )
    if raw_label:
        samples.raw_label = _raw_label(dataset, segment, samples.index)
    return samples


# -- frames ------------------------------------------------------------------------------------


def _samples_from_frame(
    frame: pd.DataFrame,
    name: str,
    data_key: str,
    step_len: int,
    fill: str,
    *,
    dates: slice = slice(None),
    num_purged_days: int = 0,
) -> Samples:
    """Build samples from a frame with columns `(group, name)` and rows in any order."""
    if not len(frame):
        raise DataError(f"{name} has no samples: the frame is empty.")
    if frame.columns.nlevels != 2:
        raise DataError(
            f"expected columns (group, name) with the groups {GROUPS}, got {frame.columns.nlevels} "
            "level(s). Build them with pd.concat({'feature': x, 'label': y}, axis=1)."
        )
    groups = {str(group) for group in frame.columns.get_level_values(0)}
    if GROUPS[0] not in groups:
        raise DataError(unknown_name_message("group of columns", GROUPS[0], groups))
    return build_samples(
        view_from_frame(frame.sort_index()),
        start=dates.start,
        end=dates.stop,
        name=name,
        step_len=step_len,
        fill=fill,
        learn=data_key == "learn",
        horizon=num_purged_days,
        later_starts=[pd.Timestamp.max],  # the frame ends with its segment
    )


def _plain_frame_dates(
    segment: str | slice | None, purge: bool | None, horizon: int | None
) -> slice:
    if purge or horizon is not None:
        raise ConfigError(
            "purge and horizon apply to segments that are followed by others, but a plain frame "
            "has no segments: end its dates earlier instead."
        )
    if isinstance(segment, str):
        raise DataError(
            f"a plain frame has no segment {segment!r}; pass a slice of dates, or use a DatasetH "
            "with segments."
        )
    return segment or slice(None)


# -- windows -----------------------------------------------------------------------------------


def _samples_from_windows(
    windows: Any,
    num_labels: int,
    fill: str,
    segment: str,
    data_key: str,
    num_purged_days: int,
) -> Samples:
    index = windows.get_index()
    if not len(index):
        raise DataError(f"{segment} has no samples: prepare returned no windows.")
    dates, names = _index_levels(index)
    instruments = pd.Index(np.unique(names.to_numpy(dtype=object)), dtype="str")
    calendar = pd.DatetimeIndex(np.unique(dates))
    date, instrument = calendar.get_indexer(dates), instruments.get_indexer(names)
    order = np.lexsort((instrument, date))
    if all(hasattr(windows, name) for name in ("data_arr", "idx_df", "step_len")):
        values, exists, storage_index = _dense_values(windows, dates, names)
        step_len = int(windows.step_len)
    else:
        if callable(getattr(windows, "config", None)):
            windows.config(fillna_type=fill)
        values = _read_windows(windows, len(index))
        exists, step_len = None, int(values.shape[1])
        storage_index = (torch.full((len(index),), step_len - 1), torch.arange(len(index)))
    count = values.shape[2] - num_labels
    if count < 1:
        raise DataError(
            f"the windows have {values.shape[2]} columns, of which {num_labels} are labels; "
            "no feature column is left."
        )
    packed_features = DensePackedColumns(
        values[:, :, :count].clone(), history=exists, owns_values=True
    )
    column_names = [f"column {k}" for k in range(count)]
    check_processed_columns(column_names, packed_features.infinite_columns().tolist(), "features")
    sample_order = torch.as_tensor(order[date[order] < len(calendar) - num_purged_days])
    notes = {"purged": len(order) - len(sample_order)}
    if not len(sample_order):
        raise DataError(f"{segment} has no samples: all {len(order)} are purged.")
    target = values[storage_index[1], storage_index[0], count:][sample_order]
    labels = [f"label{k}" for k in range(num_labels)]
    if data_key == "learn":
        has_label = label_mask(segment, labels, finite_labels(labels, target, learn=True))
        notes["unlabelled"] = int((~has_label).sum())
        sample_order, target = sample_order[has_label], target[has_label]
    log_samples(segment, len(sample_order), notes, num_purged_days, learn=data_key == "learn")
    storage_index = (storage_index[0][sample_order], storage_index[1][sample_order])
    return Samples(
        packed_features,
        torch.as_tensor(date)[sample_order],
        torch.as_tensor(instrument)[sample_order],
        calendar=calendar,
        instruments=instruments,
        feature_names=[f"feature{k}" for k in range(count)],
        label_names=labels,
        target=target if labels else None,
        step_len=step_len,
        fill=fill,
        storage_index=storage_index,
        notes=notes,
        horizon=num_purged_days or None,
    )


def _dense_values(
    sampler: Any, dates: pd.DatetimeIndex, names: pd.Index
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return a TSDataSampler's rows as a dense tensor, and the positions of its samples.

    Values are `[N, D, K]`, NaN where a row does not exist; the second tensor, `[D, N]` bool, marks
    the rows that exist.
    """
    table = sampler.idx_df
    row_numbers = table.to_numpy(dtype=np.float64, na_value=np.nan)
    exists = ~np.isnan(row_numbers)
    rows = np.where(exists, row_numbers, len(sampler.data_arr) - 1).astype(np.int64)
    values = np.asarray(sampler.data_arr, dtype=np.float32)[rows.T]
    calendar = normalise_calendar(table.index)
    storage_index = (
        torch.as_tensor(calendar.get_indexer(dates)),
        torch.as_tensor(table.columns.astype(str).get_indexer(names)),
    )
    values[~exists.T] = np.nan
    return torch.from_numpy(values), torch.as_tensor(exists), storage_index


def _read_windows(windows: Any, count: int) -> Tensor:
    """Read windows `[S, T, K]` by item access; an unknown sampler is copied out once."""
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
    """Return the raw labels `[S, Q]`, or None if the dataset's handler cannot provide them."""
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
    rows = pd.MultiIndex.from_arrays(_index_levels(frame.index), names=list(NAMES))
    values = frame.set_axis(rows, axis=0).reindex(index).to_numpy(dtype=np.float32, copy=True)
    values[np.isinf(values)] = np.nan
    return torch.as_tensor(values)


def _index_levels(index: pd.MultiIndex) -> tuple[pd.DatetimeIndex, pd.Index]:
    """Return the dates and the names of a `(datetime, instrument)` index, whatever its order."""
    dates = normalise_calendar(index.get_level_values(NAMES[0]))
    return dates, index.get_level_values(NAMES[1]).astype(str)


# -- segments ----------------------------------------------------------------------------------


def check_disjoint_days(dataset: Any, train: Samples, valid: Samples) -> None:
    """Raise ConfigError if train and valid share a day, judged by the samples themselves.

    qtorch datasets are skipped, because they check the dates of their segments themselves.
    """
    if callable(getattr(dataset, "samples", None)) or getattr(dataset, "allow_overlap", False):
        return
    days = [s.calendar[torch.unique(s.date).cpu().numpy()] for s in (train, valid)]
    common_days = days[0].intersection(days[1])
    if len(common_days):
        raise ConfigError(
            f"segments 'train' and 'valid' overlap: {type(dataset).__name__}.prepare returned "
            f"{len(common_days)} days in both, the first {common_days[0]:%Y-%m-%d}. The model "
            "would be validated on samples that it was trained on."
        )


def count_purged_days(dataset: Any, segment: Any, horizon: int | None, *, strict: bool) -> int:
    """Return how many days at the end of a segment have labels that reach into another segment.

    If the label's horizon is unknown, log a warning, or raise ConfigError if `strict`.
    """
    if not _has_later_segment(segment, _segment_spans(dataset)):
        return 0
    for num_days in (horizon, getattr(dataset, "horizon", None), _label_reach(dataset)):
        if num_days is not None:
            return max(0, int(num_days))
    hint = (
        f"cannot tell how far the label of {type(dataset).__name__} looks ahead; set an attribute "
        "`horizon` (bars) on the dataset"
    )
    if strict:
        raise ConfigError(f"purge=True: {hint}, or get_samples(..., horizon=...).")
    log.warning("%s: no samples are purged, %s", segment, hint)
    return 0


def _segment_spans(dataset: Any) -> dict[str, tuple[Any, Any]]:
    """Return the dataset's segments that are pairs of dates, by name."""
    segments = getattr(dataset, "segments", None)
    pairs = segments.items() if isinstance(segments, Mapping) else ()
    return {str(n): (s[0], s[1]) for n, s in pairs if isinstance(s, list | tuple) and len(s) == 2}


def _has_later_segment(segment: Any, spans: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether another segment may begin after this one; True if no dates are known."""
    if isinstance(segment, slice):
        end = segment.stop
    elif str(segment) in spans:
        end = spans[str(segment)][1]
    else:
        return True
    starts = [as_stamp(start) for start, _ in spans.values() if start is not None]
    return end is not None and (not spans or any(s > last_instant(end) for s in starts))


def _label_reach(dataset: Any) -> int | None:
    """Return how far the label's expressions look ahead, if a loader like Qlib's shows them."""
    loader = getattr(getattr(dataset, "handler", None), "data_loader", None)
    fields = getattr(loader, "fields", None)
    label = fields.get("label") if isinstance(fields, Mapping) else None
    try:
        return max(reach(str(expression))[1] for expression in label[0]) if label else None
    except (ExpressionError, TypeError):
        return None  # the expression is in another language
