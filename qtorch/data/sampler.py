"""What `TSDatasetH.prepare` gives: windows by position, for whoever worked with Qlib's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.gather import DensePacked, check_fill
from qtorch.data.panel import NAMES
from qtorch.data.view import View

BLOCK = 16


class TSDataSampler:
    """Windows `[step_len, columns]` of a segment's samples, the sample's own day last.

    `sampler[3]`, `sampler["2016-12-30", "A"]` (the last day up to that date), `sampler[[0, 5]]`
    -> `[2, step_len, columns]`; float32, labels behind the features. Samples are ordered by
    instrument, then date, as Qlib's are; `get_index()` gives `(datetime, instrument)` in this
    order. Windows reach back before the segment. `config(fillna_type=...)` says what stands for
    rows that do not exist: "none" NaN, "ffill" the row before it, "ffill+bfill" then the row
    behind it.

    Answers to qlib/data/dataset/__init__.py (TSDataSampler). Difference: rows that DropnaLabel
    took away as samples are still seen by windows. Training does not need this object: it
    gathers batches on the device (`dataset.samples`).
    """

    def __init__(
        self,
        view: View,
        span: slice,
        *,
        step_len: int,
        groups: Sequence[str],
        samples: Tensor | None = None,
        fillna_type: str = "none",
        dtype: Any = None,
    ) -> None:
        check_fill(fillna_type)
        self.step_len = step_len
        self.fillna_type = fillna_type
        self.dtype = np.dtype(np.float32 if dtype is None else dtype)
        first = max(0, span.start - step_len)
        seen = slice(first, span.stop)
        self._calendar = view.calendar[seen]
        self._instruments = view.instruments
        self._packed = _packed(view, seen, groups)
        rows = view.rows.clone() if samples is None else view.rows & samples
        rows[: span.start] = False
        by_name = np.argsort(view.instruments.to_numpy(dtype=object), kind="stable")
        order = torch.as_tensor(by_name)
        place, self._date = torch.nonzero(rows[seen][:, order].t(), as_tuple=True)
        self._instrument = order[place]

    def __len__(self) -> int:
        return len(self._date)

    @property
    def empty(self) -> bool:
        """Whether there is no sample."""
        return len(self) == 0

    @property
    def start(self) -> pd.Timestamp | None:
        """The first sample's date."""
        return None if self.empty else self._calendar[int(self._date.min())]

    @property
    def end(self) -> pd.Timestamp | None:
        """The last sample's date."""
        return None if self.empty else self._calendar[int(self._date.max())]

    @property
    def data_index(self) -> pd.MultiIndex:
        """`(instrument, datetime)` of every sample."""
        return self.get_index().swaplevel()

    def get_index(self) -> pd.MultiIndex:
        """`(datetime, instrument)` of every sample, ordered by instrument."""
        return pd.MultiIndex.from_arrays(
            [self._calendar[self._date.numpy()], self._instruments[self._instrument.numpy()]],
            names=list(NAMES),
        )

    def config(self, *, fillna_type: str | None = None) -> None:
        """Choose what stands for rows that do not exist."""
        if fillna_type is not None:
            check_fill(fillna_type)
            self.fillna_type = fillna_type

    def __getitem__(self, idx: Any) -> np.ndarray:
        many = isinstance(idx, list | np.ndarray | Tensor)
        asked = [idx] if not many else list(idx)
        at = [self._place(i) for i in asked]
        date = torch.tensor([d for d, _ in at], dtype=torch.int64)
        instrument = torch.tensor([n for _, n in at], dtype=torch.int64)
        x = self._packed.gather(date, instrument, self.step_len, self.fillna_type).numpy()
        windows: np.ndarray = x.astype(self.dtype, copy=False)
        return windows if many else windows[0]

    def _place(self, idx: Any) -> tuple[int, int]:
        if isinstance(idx, tuple):
            return self._named(*idx)
        try:
            k = int(idx)
        except (TypeError, ValueError):
            raise ConfigError(
                f"a window is addressed by a position, (datetime, instrument), or a list of "
                f"these; got {idx!r:.80}."
            ) from None
        if not 0 <= k < len(self):
            raise IndexError(f"{k} is out of [0, {len(self)})")
        return int(self._date[k]), int(self._instrument[k])

    def _named(self, date: Any, instrument: Any) -> tuple[int, int]:
        row = int(self._calendar.searchsorted(pd.Timestamp(date), side="right")) - 1
        if row < 0:
            raise DataError(f"there is no window up to {date}: the data begins later.")
        names = self._instruments
        column = int(names.get_indexer(pd.Index([str(instrument)], dtype="str"))[0])
        if column < 0:
            raise DataError(unknown_name("instrument", str(instrument), names))
        return row, column


def _packed(view: View, seen: slice, groups: Sequence[str]) -> DensePacked:
    """The groups' columns side by side, `[N, D, K]`."""
    names = [(g, n) for g in groups for n in view.group(g).names]
    values = torch.empty(len(view.instruments), seen.stop - seen.start, len(names))
    done = 0
    for group in groups:
        columns = view.group(group)
        for first in range(0, len(columns.names), BLOCK):
            part = columns.names[first : first + BLOCK]
            block = columns.block(part)[:, seen]
            values[:, :, done : done + len(part)] = block.permute(2, 1, 0).cpu()
            done += len(part)
    return DensePacked(values, history=view.history[seen].cpu())
