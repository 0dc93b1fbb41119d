"""Samples: pairs (date row, instrument column) into columns that stay on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.batches import Batch
from qtorch.data.columns import Columns, PanelColumns
from qtorch.data.extras import Gatherable
from qtorch.data.gather import NAN, Packed, check_fill, infinite_message
from qtorch.data.placement import STORES, Store, fits
from qtorch.data.reweighter import Reweighter, checked_weights
from qtorch.data.sample_table import SampleTable
from qtorch.data.view import multi_index

log = logging.getLogger(__name__)

DAY_BUCKETS = 8
# How much is laid out at once where the features become a matrix.
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 4096, 16


class Samples:
    """The samples of one segment in (datetime, instrument) order, and how to gather them.

    `date` and `instrument` are int64 `[S]`; `target [S, Q]` the processed labels, `raw_label
    [S, Q]` the unprocessed ones (for IC), `weight [S]`; each of the last three may be None.
    `features` are Columns, packed on the device at the first batch or by `to(device)`, or an
    object already packed. Features that hold an infinity are refused when they are packed.
    `extras`: named tensors that each batch has in its `extra`. `horizon`: calendar rows that the
    labels look ahead, None where that was not asked or is not known.
    """

    def __init__(
        self,
        features: Columns | Packed,
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
        place: tuple[Tensor, Tensor] | None = None,
        notes: Mapping[str, int] | None = None,
        extras: Mapping[str, Gatherable] | None = None,
        horizon: int | None = None,
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
        self.notes = dict(notes or {})
        self.extras = dict(extras or {})
        self.horizon = horizon
        self.store = "device"
        self.device = date.device
        self._place = place
        self._columns = features if isinstance(features, Columns) else None
        self._packed = features if isinstance(features, Packed) else None
        self._known: SampleTable | None = None
        self._set_days()

    def _set_days(self) -> None:
        days, counts = torch.unique_consecutive(self.date, return_counts=True)
        if len(days) and bool((days[1:] <= days[:-1]).any()):
            raise AssertionError("samples must come in (datetime, instrument) order")
        self._counts = counts.cpu()
        self._first = self._counts.cumsum(0) - self._counts
        self._largest = int(self._counts.max()) if len(days) else 0
        self._bucket = max(1, -(-self._largest // DAY_BUCKETS))

    # -- what there is -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.date)

    @property
    def num_days(self) -> int:
        """Days with at least one sample."""
        return len(self._counts)

    @property
    def most_a_day(self) -> int:
        """Samples of the day that has most of them."""
        return self._largest

    @property
    def packed(self) -> Packed:
        """The features laid out for gathering; packed now if they were not."""
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
        features = self._columns if self._columns is not None else self.packed
        return features.window_shape(self.step_len)

    @property
    def index(self) -> pd.MultiIndex:
        """`(datetime, instrument)` of every sample, in their order."""
        return multi_index(self.calendar, self.instruments, self.date, self.instrument)

    @property
    def index_device(self) -> torch.device:
        """Where the row numbers given to `batch` should lie."""
        return self.date.device

    def describe(self) -> dict[str, Any]:
        """What a log line or a summary says of these samples."""
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
        """The samples' own rows: `(datetime, instrument)` by `(group, name)`.

        Groups: "label" (processed), "raw_label", "feature" (the last step of the window).
        """
        parts: dict[tuple[str, str], np.ndarray] = {}
        for group in groups:
            names, values = self._group_values(group)
            for k, name in enumerate(names):
                parts[group, name] = values[:, k].cpu().numpy()
        return pd.DataFrame(parts, index=self.index)

    def rows(self) -> Tensor:
        """The features of each sample's own day, `[S, F]` float32, as `feature_names` calls them.

        Of windows it is the last step. A column lies in one piece, so that nothing is copied by
        who wants columns; the whole is what it costs.
        """
        out = torch.empty(len(self.feature_names), len(self), device=self.date.device)
        if self._columns is None:
            every = torch.arange(len(self), device=self.index_device)
            for part in torch.split(every, ROWS_AT_ONCE):
                out[:, part] = self.batch(part).x[:, -1].t()
            return out.t()
        home = self._columns.device
        first, last = (int(self.date[k]) for k in (0, -1))
        at = (self.date - first).to(home) * len(self.instruments) + self.instrument.to(home)
        for k in range(0, len(out), COLUMNS_AT_ONCE):
            names = self.feature_names[k : k + COLUMNS_AT_ONCE]
            block = self._columns.block(names, rows=slice(first, last + 1)).flatten(1)
            out[k : k + len(names)] = block.index_select(1, at)
        return out.t()

    def _group_values(self, group: str) -> tuple[tuple[str, ...], Tensor]:
        found = {"label": self.target, "raw_label": self.raw_label}
        if group == "feature":
            return self.feature_names, self.rows()
        if group not in found:
            raise DataError(unknown_name("group of columns", group, ("feature", *found)))
        values = found[group]
        if values is None:
            raise DataError(f"these samples have no {group}.")
        return self.label_names, values

    def __repr__(self) -> str:
        told = self.describe()
        return (
            f"Samples({told['samples']:,} of {told['start']}..{told['end']}, "
            f"{told['instruments']} instruments, {told['features']} features)"
        )

    # -- batches -------------------------------------------------------------------------------

    def batch(self, rows: Tensor, *, size: int | None = None) -> Batch:
        """The samples `rows`, int64 `[B]` on `index_device`.

        With `size` the batch is padded to so many rows and has a mask.
        """
        count = len(rows)
        if size is None:
            return self._gathered(rows)
        gone = torch.arange(count, size, device=rows.device)
        batch = self._gathered(torch.nn.functional.pad(rows, (0, size - count)), gone)
        batch.num_samples = count
        return batch

    def day_batch(self, days: Tensor, *, num_days: int | None = None) -> Batch:
        """Whole days `[G, N, ...]`: `days` int64 `[G]` on the CPU count the days with samples.

        Every row of a day is one sample of that date, so a batch holds true cross-sections. N is
        the largest day's size rounded up to one of at most eight sizes; `num_days` pads G.
        """
        counts = self._counts[days]
        width = min(self._largest, -(-int(counts.max()) // self._bucket) * self._bucket)
        num_samples = int(counts.sum())
        if num_days is not None and num_days > len(days):
            pad = (0, num_days - len(days))
            days, counts = (torch.nn.functional.pad(t, pad) for t in (days, counts))
        # What is padding is known on the host: the device is not asked.
        offsets = torch.arange(width)
        there = offsets < counts[:, None]
        gone = torch.nonzero(~there.reshape(-1))[:, 0]
        rows = (self._first[days][:, None] + offsets * there).reshape(-1)
        device = self.index_device
        batch = self._gathered(rows.to(device), gone.to(device)).unflattened(len(days), width)
        batch.num_samples = num_samples
        return batch

    def _gathered(self, rows: Tensor, gone: Tensor | None = None) -> Batch:
        """The samples `rows`; with `gone`, places in the batch that are padding, a mask too."""

        table = self._table()
        date, instrument, *at = table.places(rows)
        if len(at) == 1:
            x = self.packed.windows(at[0], self.step_len)
        else:
            days, who = at or (date, instrument)
            x = self.packed.gather(days, who, self.step_len, self.fill)
        extra = {name: source.gather(date, instrument) for name, source in self.extras.items()}
        y, raw, weight = table.values(rows)
        mask = None
        if gone is not None:
            empty = [x, weight, *(e for e in extra.values() if e.is_floating_point())]
            for value, filler in (*((v, 0.0) for v in empty), (y, NAN), (raw, NAN)):
                if value is not None:
                    value.index_fill_(0, gone, filler)
            mask = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            mask.index_fill_(0, gone, False)
        if raw is not None:
            extra["raw_label"] = raw
        return Batch(
            x=x, date=date, instrument=instrument, y=y, weight=weight, mask=mask, extra=extra
        )

    def _table(self) -> SampleTable:
        """Date and instrument of each sample, where its window lies, its labels and weight."""
        values = (self.target, self.raw_label, self.weight)
        if self._known is None or not self._known.holds(values):
            at = (self.date, self.instrument) if self._place is None else self._place
            begin = self.packed.begins(*at, self.step_len, self.fill)
            where = (self._place or ()) if begin is None else (begin,)
            self._known = SampleTable((self.date, self.instrument, *where), values)
        return self._known

    # -- device --------------------------------------------------------------------------------

    def to(self, device: torch.device | str, *, store: Store = "auto") -> Samples:
        """These samples for batches on `device`.

        `store`: "device" keeps the features there, "host" in host memory (each batch is then
        sent over while the one before it is worked on), "auto" decides by the device's free
        memory.
        """
        if store not in STORES:
            raise ConfigError(unknown_name("store", store, STORES))
        target = torch.device(device)
        if str(target) == "cuda":
            target = torch.device("cuda", torch.cuda.current_device())
        where = "host" if store == "host" or (store == "auto" and self._too_large(target)) else ""
        home = torch.device("cpu") if where == "host" else target
        moved = self._moved(home)
        moved.store = where or "device"
        moved.device = target
        if where == "host" and target.type != "cpu":
            log.info(
                "the features (%.2f GB) stay in host memory; batches are sent to %s ahead of use",
                self._num_bytes() / 1e9,
                target,
            )
        moved._pack(home)
        return moved

    def sent(self, batch: Batch) -> Batch:
        """A batch gathered in host memory on its way to the device; returns at once."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.pin_memory().to(self.device, non_blocking=True)

    def _moved(self, home: torch.device, columns: Columns | None = None) -> Samples:
        def there(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(home)

        place = self._place
        features: Columns | Packed | None = self._columns if columns is None else columns
        if features is None:
            packed = self.packed
            features = packed if packed.device == home else packed.to(home)
        return Samples(
            features,
            self.date.to(home),
            self.instrument.to(home),
            calendar=self.calendar,
            instruments=self.instruments,
            feature_names=self.feature_names,
            label_names=self.label_names,
            target=there(self.target),
            raw_label=there(self.raw_label),
            weight=there(self.weight),
            history=self.history,
            step_len=self.step_len,
            fill=self.fill,
            place=None if place is None else (place[0].to(home), place[1].to(home)),
            notes=self.notes,
            extras={name: source.to(home) for name, source in self.extras.items()},
            horizon=self.horizon,
        )

    def _pack(self, device: torch.device) -> Packed:
        if self._packed is not None:
            return self._packed
        assert self._columns is not None
        packed = self._columns.pack(device, history=self.history)
        if not packed.checked:
            bad = packed.infinite().cpu().numpy()
            if bad.any():
                names = [n for n, wrong in zip(self._columns.names, bad, strict=True) if wrong]
                raise DataError(infinite_message(names, "features"))
            packed.checked = True
        self._packed = packed
        return packed

    def _num_bytes(self) -> int:
        if self._packed is not None:
            return self._packed.num_bytes
        assert self._columns is not None
        return self._columns.num_bytes

    def _too_large(self, device: torch.device) -> bool:
        """Whether the features would not fit; what lies there already takes nothing more."""
        if fits(self._num_bytes(), device):
            return False
        if self._columns is not None:
            return self._columns.shared_pack(device, self.history) is None
        return self.packed.device != device

    @property
    def arrangeable(self) -> bool:
        """Whether `with_features` can put the features in another order."""
        return isinstance(self._columns, PanelColumns)

    def with_features(self, names: Sequence[str]) -> Samples:
        """These samples with their features by `names`, in that order."""
        assert self._columns is not None, "ask `arrangeable` first"
        moved = self._moved(self.date.device, self._columns.keep(names))
        moved.feature_names = tuple(names)
        return moved

    # -- weights -------------------------------------------------------------------------------

    def reweighted(self, reweighter: Reweighter | Any | None) -> Samples:
        """These samples with the weights of a reweighter (None: unchanged).

        Anything with Qlib's `reweight(data)` will do; it is handed `frame(reweighter.needs)`.
        """
        if reweighter is None:
            return self
        if not callable(getattr(reweighter, "reweight", None)):
            raise ConfigError(
                f"{type(reweighter).__name__} is no reweighter: it has no reweight(data) method."
            )
        data = self.frame(getattr(reweighter, "needs", ("label",)))
        weight = checked_weights(reweighter.reweight(data), self.index)
        moved = self._moved(self.date.device)
        moved.weight = weight.to(self.date.device)
        moved.store, moved.device = self.store, self.device
        moved._packed = self._packed
        return moved
