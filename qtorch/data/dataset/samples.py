"""Samples: (date row, instrument column) pairs into feature columns that stay on the device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import as_stamp, last_instant
from qtorch.core.errors import (
    ConfigError,
    DataError,
    format_count,
    join_names,
    unknown_name_message,
)
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.extras import Extra, Gatherable
from qtorch.data.dataset.reweighter import Reweighter, check_reweighter, validate_weights
from qtorch.data.device_memory import free_bytes
from qtorch.data.panel.columns import COLUMNS_AT_ONCE, Columns, PanelColumns, column_parts
from qtorch.data.panel.gather import PackedColumns, check_fill
from qtorch.data.panel.infinite import check_processed_columns
from qtorch.data.panel.panel import coverage_dates, multi_index
from qtorch.data.panel.view import View
from qtorch.data.transfer import send_to_device

log = logging.getLogger(__name__)

DAY_BUCKETS = 8  # the number of different widths of day batches
# How many samples are gathered at once when packed features are converted to a matrix.
ROWS_AT_ONCE = 4096
Store = Literal["auto", "device", "host"]
STORES: tuple[str, ...] = ("auto", "device", "host")
# The share of the device's free memory that the features may take; larger ones stay on the host.
DEVICE_SHARE = 0.6
CELL_BYTES = 32  # at most, while the features are packed


class Samples:
    """The samples of one segment in (datetime, instrument) order, and how to gather them.

    `date` and `instrument` are int64 `[S]`; `target [S, Q]` the processed labels, `raw_label
    [S, Q]` the unprocessed ones (for IC), `weight [S]`; each of the last three may be None.
    `features` are Columns, which are packed on the device at the first batch or by `to(device)`, or
    columns that are already packed. Packing raises DataError for features that hold an infinity.
    `storage_index`: (date row, instrument column) of each sample's window in the packed features,
    if they differ from `date` and `instrument`. `notes`: counts for logs and summaries, e.g. of
    purged samples. `extras`: named tensors that each batch has in its `extra`. `horizon`: calendar
    rows that the labels look ahead, None if it is unknown or was not needed. `feature_dtype`: the
    dtype of packed features; batches are float32.
    """

    def __init__(
        self,
        features: Columns | PackedColumns,
        date: Tensor,
        instrument: Tensor,
        *,
        calendar: pd.DatetimeIndex,
        instruments: pd.Index,
        feature_names: Iterable[str],
        label_names: Iterable[str] = (),
        target: Tensor | None = None,
        raw_label: Tensor | None = None,
        weight: Tensor | None = None,
        history: Tensor | None = None,
        step_len: int = 1,
        fill: str = "ffill+bfill",
        storage_index: tuple[Tensor, Tensor] | None = None,
        notes: Mapping[str, int] | None = None,
        extras: Mapping[str, Gatherable] | None = None,
        horizon: int | None = None,
        feature_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_fill(fill)
        if step_len < 1:
            raise ConfigError(f"step_len must be at least 1, got {step_len}.")
        self.date, self.instrument = date, instrument
        self.calendar, self.instruments = calendar, instruments
        self.feature_names, self.label_names = tuple(feature_names), tuple(label_names)
        self.target, self.raw_label, self.weight = target, raw_label, weight
        self.history = history
        self.step_len, self.fill = step_len, fill
        self.feature_dtype = feature_dtype
        self.notes = dict(notes or {})
        self.extras = dict(extras or {})
        self.horizon = horizon
        self.store = "device"
        self.device = date.device
        self._storage_index = storage_index
        self._columns = features if isinstance(features, Columns) else None
        self._feature_pack = features if isinstance(features, PackedColumns) else None
        self._cached_table: SampleTable | None = None
        self._set_days()

    def _set_days(self) -> None:
        days, counts = torch.unique_consecutive(self.date, return_counts=True)
        if len(days) and bool((days[1:] <= days[:-1]).any()):
            raise AssertionError("samples must come in (datetime, instrument) order")
        self._day_counts = counts.cpu()
        self._day_starts = self._day_counts.cumsum(0) - self._day_counts
        self._max_day_size = int(self._day_counts.max()) if len(days) else 0
        self._day_size_step = max(1, -(-self._max_day_size // DAY_BUCKETS))

    # -- contents ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.date.shape[0]  # faster than len()

    @property
    def num_days(self) -> int:
        """The number of days with at least one sample."""
        return len(self._day_counts)

    @property
    def max_samples_per_day(self) -> int:
        """The number of samples of the largest day."""
        return self._max_day_size

    @property
    def feature_pack(self) -> PackedColumns:
        """The features laid out for gathering; packed on first use."""
        return self._pack(self.date.device)

    @property
    def num_features(self) -> int:
        """F of a batch's `x [B, T, F]`."""
        return self._window_shape()[1]

    @property
    def num_steps(self) -> int:
        """T of a batch's `x [B, T, F]`."""
        return self._window_shape()[0]

    def _window_shape(self) -> tuple[int, int]:
        features = self._columns if self._columns is not None else self.feature_pack
        return features.window_shape(self.step_len)

    @property
    def index(self) -> pd.MultiIndex:
        """The `(datetime, instrument)` index of the samples, in their order."""
        return multi_index(self.calendar, self.instruments, self.date, self.instrument)

    @property
    def index_device(self) -> torch.device:
        """The device on which `batch` expects its row numbers."""
        return self.date.device

    def day_sizes(self, days: Tensor) -> Tensor:
        """Return the number of samples of days with samples, int64 in the shape of `days`."""
        counts: Tensor = self._day_counts[days]
        return counts

    def describe(self) -> dict[str, Any]:
        """Return a summary of the samples for logs and reports."""
        days = self.date[[0, -1]].tolist() if len(self) else []
        span = [f"{self.calendar[d]:%Y-%m-%d}" for d in days]
        return {
            "samples": len(self),
            "days": self.num_days,
            "instruments": int(torch.bincount(self.instrument).count_nonzero()),
            "start": span[0] if span else None,
            "end": span[1] if span else None,
            "features": len(self.feature_names),
            "labels": len(self.label_names),
            "step_len": self.step_len,
            **self.notes,
        }

    def frame(self, groups: Iterable[str] = ("label",)) -> pd.DataFrame:
        """Return the samples' own rows as a frame: `(datetime, instrument)` by `(group, name)`.

        Groups: "label" (processed), "raw_label", "feature" (the last step of the window).
        """
        parts: dict[tuple[str, str], np.ndarray] = {}
        for group in groups:
            names, values = self._group_values(group)
            for k, name in enumerate(names):
                parts[group, name] = values[:, k].cpu().numpy()
        return pd.DataFrame(parts, index=self.index)

    def rows(self) -> Tensor:
        """Return the features of each sample's own day, `[S, F]` float32, as in `feature_names`.

        For windows this is the last step. Each column is contiguous, so taking a column copies
        nothing; the whole matrix is allocated.
        """
        out = torch.empty(len(self.feature_names), len(self), device=self.date.device)
        if self._columns is None:
            all_rows = torch.arange(len(self), device=self.index_device)
            for part in torch.split(all_rows, ROWS_AT_ONCE):
                out[:, part] = self.batch(part).x[:, -1].t()
            return out.t()
        first, last = (int(self.date[k]) for k in (0, -1))
        cells = (self.date - first) * len(self.instruments) + self.instrument
        cells = cells.to(self._columns.device)
        parts = column_parts(self.feature_names)
        for names, target in zip(parts, torch.split(out, COLUMNS_AT_ONCE), strict=False):
            block = self._columns.block(names, rows=slice(first, last + 1)).flatten(1)
            torch.index_select(block, 1, cells, out=target)
        return out.t()

    def _group_values(self, group: str) -> tuple[tuple[str, ...], Tensor]:
        targets = {"label": self.target, "raw_label": self.raw_label}
        if group == "feature":
            return self.feature_names, self.rows()
        if group not in targets:
            raise DataError(unknown_name_message("group of columns", group, ("feature", *targets)))
        values = targets[group]
        if values is None:
            raise DataError(f"these samples have no {group}.")
        return self.label_names, values

    def __repr__(self) -> str:
        summary = self.describe()
        return (
            f"Samples({summary['samples']:,} of {summary['start']}..{summary['end']}, "
            f"{summary['instruments']} instruments, {summary['features']} features)"
        )

    # -- batches -------------------------------------------------------------------------------

    def batch(
        self, rows: Tensor, *, size: int | None = None, columns: TableRows | None = None
    ) -> Batch:
        """Gather the samples `rows`, int64 `[B]` on `index_device`.

        With `size` the batch is padded to that many rows and has a mask. `columns` are those of the
        table at `rows`, if they have been gathered.
        """
        count = len(rows)
        if size is None or size == count:
            batch = self._gather(rows, columns=columns)
            if size is not None:
                batch.mask = torch.ones(count, dtype=torch.bool, device=rows.device)
            return batch
        padding = torch.arange(count, size, device=rows.device)
        mask = torch.arange(size, device=rows.device) < count
        batch = self._gather(torch.nn.functional.pad(rows, (0, size - count)), padding, mask)
        batch.num_samples = count
        return batch

    def day_batch(self, days: Tensor, *, num_days: int | None = None) -> Batch:
        """Gather whole days `[G, N, ...]`; `days` int64 `[G]` on the CPU index days with samples.

        Every row of a day is one sample of that date, so a batch holds true cross-sections. N is
        the largest day's size, rounded up to one of at most eight sizes; `num_days` pads G.
        """
        counts = self._day_counts[days]
        width = min(
            self._max_day_size, -(-int(counts.max()) // self._day_size_step) * self._day_size_step
        )
        num_samples = int(counts.sum())
        if num_days is not None and num_days > len(days):
            pad = (0, num_days - len(days))
            days, counts = (torch.nn.functional.pad(t, pad) for t in (days, counts))
        # The host computes which rows are padding, so it does not wait for the device.
        offsets = torch.arange(width)
        is_sample = offsets < counts[:, None]
        mask = is_sample.reshape(-1)
        padding = torch.nonzero(~mask)[:, 0]
        rows = (self._day_starts[days][:, None] + offsets * is_sample).reshape(-1)
        count = len(rows)
        # One copy for all of them: the mask's bytes as integers after the others.
        mask_numbers = torch.nn.functional.pad(mask, (0, -count % 8)).view(torch.int64)
        indices = send_to_device(torch.cat((rows, padding, mask_numbers)), self.index_device)
        sizes = [count, len(padding), len(mask_numbers)]
        rows, padding, mask_numbers = torch.split(indices, sizes)
        mask = mask_numbers.view(torch.bool)[:count]
        batch = self._gather(rows, padding, mask).unflatten(len(days), width)
        batch.num_samples = num_samples
        return batch

    def _gather(
        self,
        rows: Tensor,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        columns: TableRows | None = None,
    ) -> Batch:
        """Gather the samples `rows`; `padding` are positions to blank, where `mask` is False."""
        columns = columns or self.get_table().rows(rows)
        date, instrument, *storage = columns.indices
        if len(storage) == 1:
            x = self.feature_pack.windows(storage[0], self.step_len)
        else:
            window_date, window_instrument = storage or (date, instrument)
            x = self.feature_pack.gather(window_date, window_instrument, self.step_len, self.fill)
        extra = {name: source.gather(date, instrument) for name, source in self.extras.items()}
        y, raw_label, weight = columns.values
        if padding is not None:
            floats = [e for e in extra.values() if e.is_floating_point()]
            for filler, values in ((0.0, [x, weight, *floats]), (torch.nan, [y, raw_label])):
                for value in values:
                    if value is not None:
                        value.index_fill_(0, padding, filler)
        if raw_label is not None:
            extra["raw_label"] = raw_label
        return Batch(
            x=x, date=date, instrument=instrument, y=y, weight=weight, mask=mask, extra=extra
        )

    def get_table(self) -> SampleTable:
        """Return the table of dates, instruments, window starts, labels and weights."""
        values = (self.target, self.raw_label, self.weight)
        if self._cached_table is None or not self._cached_table.has_values(values):
            pairs = self._storage_index or (self.date, self.instrument)
            starts = self.feature_pack.window_starts(*pairs, self.step_len, self.fill)
            storage = (self._storage_index or ()) if starts is None else (starts,)
            self._cached_table = SampleTable((self.date, self.instrument, *storage), values)
        return self._cached_table

    # -- device --------------------------------------------------------------------------------

    def to(self, device: torch.device | str, *, store: Store = "auto") -> Samples:
        """Return these samples for batches on `device`.

        `store`: "device" keeps the features on the device, "host" in host memory (each batch is
        then copied to the device while the previous one is being used), "auto" decides by the
        device's free memory.
        """
        if store not in STORES:
            raise ConfigError(unknown_name_message("store", store, STORES))
        target = torch.device(device)
        if str(target) == "cuda":
            target = torch.device("cuda", torch.cuda.current_device())
        if store == "host" or (store == "auto" and self._too_large(target)):
            if target.type != "cpu":
                log.info("%s; batches are prefetched to %s", self._host_message(), target)
            return self._move(target, "host")
        try:
            return self._move(target, "device")
        except torch.OutOfMemoryError:
            if store == "device":
                raise
        log.warning("%s: they did not fit into the memory of %s", self._host_message(), target)
        return self._move(target, "host")

    def _host_message(self) -> str:
        return f"keeping the features ({self._num_bytes() / 1e9:.2f} GB) in host memory"

    def _move(self, device: torch.device, store: str) -> Samples:
        """Return these samples for batches on `device`, packed there or in host memory."""
        storage_device = device if store == "device" else torch.device("cpu")
        result = self._copy_on_device(storage_device)
        result.store, result.device = store, device
        result._pack(storage_device)
        result.get_table()  # here, because its first use would make a training step wait
        return result

    def send_to_device(self, batch: Batch) -> Batch:
        """Return a batch on the device; one gathered in host memory is copied without blocking."""
        if self.store != "host":
            return batch
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    def _copy_on_device(self, device: torch.device) -> Samples:
        """Return a copy with all tensors on `device`; columns are packed there on first use."""
        result = copy.copy(self)
        for name in ("date", "instrument", "target", "raw_label", "weight"):
            tensor: Tensor | None = getattr(self, name)
            setattr(result, name, None if tensor is None else tensor.to(device))
        if self._storage_index is not None:
            date, instrument = self._storage_index
            result._storage_index = date.to(device), instrument.to(device)
        result.extras = {name: source.to(device) for name, source in self.extras.items()}
        result.notes = dict(self.notes)
        result.store, result.device = "device", device
        result._cached_table = result._feature_pack = None
        if self._columns is None:
            pack = self.feature_pack
            result._feature_pack = pack if pack.device == device else pack.to(device, self.step_len)
        return result

    def _pack(self, device: torch.device) -> PackedColumns:
        if self._feature_pack is not None:
            return self._feature_pack
        assert self._columns is not None
        feature_pack = self._columns.pack(
            device, history=self.history, step_len=self.step_len, dtype=self.feature_dtype
        )
        if not feature_pack.is_checked:
            infinite = feature_pack.infinite_columns().tolist()
            check_processed_columns(
                self._columns.names, infinite, "features", limit=_largest(self.feature_dtype)
            )
            feature_pack.is_checked = True
        self._feature_pack = feature_pack
        return feature_pack

    @property
    def num_feature_bytes(self) -> int:
        """The size of the packed features, with filled windows."""
        return self.feature_pack.num_bytes

    def _num_bytes(self) -> int:
        if self._feature_pack is not None:
            return self._feature_pack.num_bytes
        assert self._columns is not None
        return self._columns.num_bytes * self.feature_dtype.itemsize // torch.float32.itemsize

    def _too_large(self, device: torch.device) -> bool:
        """Whether the features do not fit; features already on the device need no more room."""
        free = free_bytes(device)
        # Beside the features each cell (date, instrument) has flags and the place of its window.
        num_cells = len(self.calendar) * len(self.instruments)
        if free is None or self._num_bytes() + CELL_BYTES * num_cells <= DEVICE_SHARE * free:
            return False
        if self._columns is not None:
            return self._columns.find_shared_pack(device, self.history, self.feature_dtype) is None
        return self.feature_pack.device != device

    @property
    def can_reorder_features(self) -> bool:
        """Whether `with_features` can select and reorder the features."""
        return isinstance(self._columns, PanelColumns)

    def with_features(self, names: Sequence[str]) -> Samples:
        """Return these samples with the features `names`, in that order."""
        assert self._columns is not None, "check `can_reorder_features` first"
        result = self._copy_on_device(self.date.device)
        result._columns, result.feature_names = self._columns.keep(names), tuple(names)
        return result

    # -- weights -------------------------------------------------------------------------------

    def apply_reweighter(self, reweighter: Reweighter | Any | None) -> Samples:
        """Return these samples with the weights of a reweighter (None: unchanged).

        Any object with Qlib's `reweight(data)` works; it receives `frame(reweighter.needs)`.
        """
        check_reweighter(reweighter)
        if reweighter is None:
            return self
        data = self.frame(getattr(reweighter, "needs", ("label",)))
        weight = validate_weights(reweighter.reweight(data), self.index)
        result = self._copy_on_device(self.date.device)
        result.weight = weight.to(self.date.device)
        result.store, result.device = self.store, self.device
        result._feature_pack = self._feature_pack
        return result


def build_samples(
    view: View,
    *,
    start: Any = None,
    end: Any = None,
    name: str = "segment",
    raw_label: Columns | None = None,
    step_len: int = 1,
    fill: str = "ffill+bfill",
    feature_group: str = "feature",
    label_group: str = "label",
    rows: Tensor | None = None,
    horizon: int = 0,
    later_starts: Iterable[Any] = (),
    learn: bool = False,
    extras: Mapping[str, Extra] | None = None,
    feature_dtype: torch.dtype = torch.float32,
) -> Samples:
    """Build the samples of a view between two dates, both inclusive.

    `rows [D, N]` bool restricts the view's rows further. With a `horizon` (calendar rows that the
    label looks ahead) and the start dates of the other segments, samples whose label reaches
    into the next segment are left out, and their number is logged. With `learn`, rows whose
    labels are all NaN are left out too (a row with some labels keeps its NaN, which the loss
    masks); for prediction every row of the view is a sample. Without the label's group the
    samples have no target. Raises DataError for a segment without samples, a label that is NaN
    everywhere, and with `learn` for infinite labels (features are checked when they are packed).
    """
    segment_rows = view.date_rows(start, end)
    starts = [view.date_rows(date).start for date in later_starts]
    date, instrument = view.sample_rows(purge_rows(segment_rows, starts, horizon), rows)
    notes = {"purged": len(view.sample_rows(segment_rows, rows)[0]) - len(date)}
    if not len(date):
        raise DataError(_empty_message(view, name, start, end, notes["purged"]))
    features = view.group(feature_group)
    labels = view.groups.get(label_group)
    target = _gather_labels(labels, date, instrument, learn)
    raw_values = _gather_labels(raw_label, date, instrument)
    if learn and labels is not None and target is not None:
        has_label = label_mask(f"{name} ({start}..{end})", labels.names, target)
        notes["unlabelled"] = int((~has_label).sum())
        date, instrument, target = date[has_label], instrument[has_label], target[has_label]
        raw_values = None if raw_values is None else raw_values[has_label]
    log_samples(name, len(date), notes, horizon, learn=learn)
    return Samples(
        features,
        date,
        instrument,
        calendar=view.calendar,
        instruments=view.instruments,
        feature_names=features.names,
        label_names=() if labels is None else labels.names,
        target=target,
        raw_label=raw_values,
        history=view.history,
        step_len=step_len,
        fill=fill,
        notes=notes,
        extras={k: e.bind(view.calendar, view.instruments) for k, e in (extras or {}).items()},
        horizon=horizon or None,
        feature_dtype=feature_dtype,
    )


def _gather_labels(
    columns: Columns | None, date: Tensor, instrument: Tensor, learn: bool = False
) -> Tensor | None:
    """Return labels `[S, Q]` of the samples; None if there are no columns."""
    if columns is None or not columns.names:
        return None
    values = torch.stack([columns.column(n)[date, instrument] for n in columns.names], 1)
    return finite_labels(columns.names, values, learn)


def finite_labels(names: Sequence[str], target: Tensor, learn: bool) -> Tensor:
    """Return the labels; infinities raise DataError for learning and become NaN otherwise."""
    infinite = target.isinf()
    if learn:
        check_processed_columns(names, infinite.any(0).tolist(), "labels")
        return target
    return target.masked_fill(infinite, torch.nan)


def label_mask(segment: str, names: Sequence[str], target: Tensor) -> Tensor:
    """Return `[S]` bool: samples with at least one label; raise DataError if there are none."""
    has_label = ~target.isnan().all(1)
    if not bool(has_label.any()):
        raise DataError(
            f"{segment}: the label {list(names)} is NaN in all {len(target)} samples. Check the "
            "label's expression, its data, and whether the dates after the segment are loaded."
        )
    return has_label


def _empty_message(view: View, name: str, start: Any, end: Any, num_purged: int) -> str:
    purged_text = format_count(num_purged, "sample was", "samples were")
    reason = f"; {purged_text} purged by the label's horizon" if num_purged else ""
    has_row = view.history[view.date_rows(start, end)]
    if bool(has_row.any()) and not num_purged:
        return (
            f"{name} ({start}..{end}) has no samples: the processors dropped all of its "
            f"{int(has_row.sum())} rows. Check whether the label is NaN everywhere."
        )
    return (
        f"{name} ({start}..{end}) has no samples: the data covers {coverage_dates(view.calendar)} "
        f"with {int(view.rows.sum())} sample rows of {len(view.instruments)} instruments{reason}. "
        "Check the segment's dates, the universe and the processors that drop rows."
    )


def log_samples(
    name: str, count: int, notes: Mapping[str, int], horizon: int, *, learn: bool
) -> None:
    """Log how many samples a segment has, and how many were left out and why.

    `learn`: they are for learning, which needs labels; otherwise for prediction.
    """
    log.info("%s: %s samples %s", name, f"{count:,}", "with labels" if learn else "to score")
    if notes.get("purged"):
        log.info(
            "%s: purged %s samples whose labels reach into the next segment (horizon %d bars)",
            name,
            f"{notes['purged']:,}",
            horizon,
        )
    if notes.get("unlabelled"):
        log.info("%s: left out %s rows without a label", name, f"{notes['unlabelled']:,}")


# -- segments ----------------------------------------------------------------------------------


def purge_rows(rows: slice, later_starts: Iterable[int], horizon: int) -> slice:
    """Remove from `rows` those whose label reaches the first later segment start.

    `rows` has a start and a stop; `later_starts` are the first rows of other segments, of which
    those before `rows.stop` are ignored. `horizon` is in calendar rows.
    """
    next_starts = [s for s in later_starts if s >= rows.stop]
    if not next_starts or horizon <= 0:
        return rows
    return slice(rows.start, max(rows.start, min(rows.stop, min(next_starts) - horizon)))


def check_segments(segments: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError for segments whose inclusive date spans overlap or end before they start.

    None as a bound is open. The message names the two segments and their dates.
    """
    spans = []
    for name, (start, end) in segments.items():
        try:
            first = pd.Timestamp.min if start is None else as_stamp(start)
            last = pd.Timestamp.max if end is None else last_instant(end)
        except DataError as error:
            raise ConfigError(f"segment {name!r} ({start}..{end}): {error}") from error
        if last < first:
            raise ConfigError(f"segment {name!r} ends ({end}) before it starts ({start}).")
        spans.append((first, last, name))
    spans.sort()
    for (_, end, name), (start, _, next_name) in pairwise(spans):
        if start <= end:
            raise ConfigError(
                f"segments {name!r} (to {_edge_text(end)}) and {next_name!r} (from "
                f"{_edge_text(start)}) overlap, so the model would be evaluated on samples that it "
                "was trained on. Both ends of a segment are inclusive: end one on the day (or the "
                "bar) before the other starts."
            )


def require_segment(name: str, segments: Collection[str], purpose: str) -> None:
    """Raise ConfigError if a dataset has no segment of this name; `purpose` says what needs it."""
    if name not in segments:
        raise ConfigError(
            f"the dataset has no segment {name!r}, {purpose}. Its segments: "
            f"{join_names(sorted(segments)) or 'none'}; set segments.{name} to its dates."
        )


def _edge_text(edge: pd.Timestamp) -> str:
    """Format the edge of a segment, without the time if it is that of a whole day."""
    if edge in (pd.Timestamp.min, pd.Timestamp.max):
        return "the first bar" if edge == pd.Timestamp.min else "the last bar"
    time = edge - edge.normalize()
    is_whole_day = time in (pd.Timedelta(0), pd.Timedelta(days=1) - pd.Timedelta(1, "ns"))
    return f"{edge:%Y-%m-%d}" if is_whole_day else f"{edge:%Y-%m-%d %H:%M:%S}"


# -- storage -----------------------------------------------------------------------------------


class SampleTable:
    """Columns of samples, gathered by row number.

    `indices` are integers `[S]` (a sample's date, its instrument, where its window begins),
    `values` float `[S]` or `[S, Q]`, or None. A matrix of one column is gathered as a vector, which
    is four times as fast in torch.
    """

    def __init__(self, indices: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        self._indices, self._values = tuple(indices), tuple(values)
        # A single operation for all of them is faster on a GPU, and slower on a CPU.
        self._index_matrix = torch.stack(self._indices, 1) if self._indices[0].is_cuda else None
        self._vectors = [v if v is None or not _single(v) else v.reshape(-1) for v in values]

    def has_values(self, values: Sequence[Tensor | None]) -> bool:
        """Whether the table was built from exactly these value tensors."""
        return all(a is b for a, b in zip(self._values, values, strict=True))

    def rows(self, rows: Tensor) -> TableRows:
        """Gather all columns at `rows`, int64 `[B]`; the results are new memory."""
        indices: Sequence[Tensor]
        if self._index_matrix is not None:
            indices = self._index_matrix.index_select(0, rows).unbind(1)
        else:
            indices = [index.index_select(0, rows) for index in self._indices]
        vectors = [None if v is None else v.index_select(0, rows) for v in self._vectors]
        values = [
            f.unsqueeze(1) if f is not None and v is not None and _single(v) else f
            for f, v in zip(vectors, self._values, strict=True)
        ]
        return TableRows(indices, values)


class TableRows(NamedTuple):
    """Columns of a `SampleTable` at some rows: index tensors `[B]`, values `[B]` or `[B, Q]`."""

    indices: Sequence[Tensor]
    values: Sequence[Tensor | None]

    def part(self, begin: int, end: int) -> TableRows:
        """Return views of the rows from `begin` to `end`."""
        return TableRows(
            [index[begin:end] for index in self.indices],
            [None if value is None else value[begin:end] for value in self.values],
        )


def _largest(dtype: torch.dtype) -> float | None:
    """Return the largest number of a dtype that features may exceed; None for the others."""
    return torch.finfo(dtype).max if dtype == torch.float16 else None


def _single(values: Tensor) -> bool:
    return values.dim() == 2 and values.shape[1] == 1
