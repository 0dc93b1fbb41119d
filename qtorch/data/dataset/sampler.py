"""The sampler that `TSDatasetH.prepare` returns: windows by position, compatible with Qlib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.data.panel.columns import column_parts
from qtorch.data.panel.gather import DensePackedColumns, check_fill
from qtorch.data.panel.panel import NAMES
from qtorch.data.panel.view import View


class TSDataSampler:
    """Windows `[step_len, columns]` of a segment's samples; the sample's own day comes last.

    `sampler[3]`, `sampler["2016-12-30", "A"]` (the last day up to that date), `sampler[[0, 5]]`
    -> `[2, step_len, columns]`; float32, with labels after the features. Samples are ordered by
    instrument, then date, as in Qlib; `get_index()` returns `(datetime, instrument)` in this
    order. Windows reach back before the segment. `config(fillna_type=...)` selects what replaces
    rows that do not exist: "none" NaN, "ffill" the row before, "ffill+bfill" then the row after.

    Corresponds to qlib/data/dataset/__init__.py (TSDataSampler). Difference: windows still include
    rows that DropnaLabel removed as samples. Training does not use this object: it gathers batches
    on the device (`dataset.samples`).
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
        window_rows = slice(max(0, span.start - step_len), span.stop)
        self._calendar = view.calendar[window_rows]
        self._instruments = view.instruments
        self._packed_columns = _pack_groups(view, window_rows, groups)
        rows = view.rows.clone() if samples is None else view.rows & samples
        rows[: span.start] = False
        by_name = np.argsort(view.instruments.to_numpy(dtype=object), kind="stable")
        order = torch.as_tensor(by_name)
        name_rank, self._date = torch.nonzero(rows[window_rows][:, order].t(), as_tuple=True)
        self._instrument = order[name_rank]

    def __len__(self) -> int:
        return len(self._date)

    @property
    def empty(self) -> bool:
        """Whether there are no samples."""
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
        """The `(instrument, datetime)` index of the samples."""
        return self.get_index().swaplevel()

    def get_index(self) -> pd.MultiIndex:
        """Return the `(datetime, instrument)` index of the samples, ordered by instrument."""
        return pd.MultiIndex.from_arrays(
            [self._calendar[self._date.numpy()], self._instruments[self._instrument.numpy()]],
            names=list(NAMES),
        )

    def config(self, *, fillna_type: str | None = None) -> None:
        """Set what replaces rows that do not exist."""
        if fillna_type is not None:
            check_fill(fillna_type)
            self.fillna_type = fillna_type

    def __getitem__(self, idx: Any) -> np.ndarray:
        is_batch = isinstance(idx, list | np.ndarray | Tensor)
        items = [idx] if not is_batch else list(idx)
        positions = [self._position(i) for i in items]
        date = torch.tensor([d for d, _ in positions], dtype=torch.int64)
        instrument = torch.tensor([n for _, n in positions], dtype=torch.int64)
        x = self._packed_columns.gather(date, instrument, self.step_len, self.fillna_type).numpy()
        windows: np.ndarray = x.astype(self.dtype, copy=False)
        return windows if is_batch else windows[0]

    def _position(self, idx: Any) -> tuple[int, int]:
        if isinstance(idx, tuple):
            return self._locate(*idx)
        try:
            k = int(idx)
        except (TypeError, ValueError):
            raise ConfigError(
                f"expected a position, (datetime, instrument), or a list of these as index; "
                f"got {idx!r:.80}."
            ) from None
        if not 0 <= k < len(self):
            raise IndexError(f"{k} is out of [0, {len(self)})")
        return int(self._date[k]), int(self._instrument[k])

    def _locate(self, date: Any, instrument: Any) -> tuple[int, int]:
        row = int(self._calendar.searchsorted(pd.Timestamp(date), side="right")) - 1
        if row < 0:
            raise DataError(f"there is no window up to {date}, because the data begins later.")
        names = self._instruments
        column = int(names.get_indexer(pd.Index([str(instrument)], dtype="str"))[0])
        if column < 0:
            raise DataError(unknown_name_message("instrument", str(instrument), names))
        return row, column


def _pack_groups(view: View, window_rows: slice, groups: Sequence[str]) -> DensePackedColumns:
    """Copy the groups' columns side by side, `[N, D, K]`."""
    names = [(g, n) for g in groups for n in view.group(g).names]
    values = torch.empty(len(view.instruments), window_rows.stop - window_rows.start, len(names))
    offset = 0
    for group in groups:
        columns = view.group(group)
        for part in column_parts(columns.names):
            block = columns.block(part)[:, window_rows]
            values[:, :, offset : offset + len(part)] = block.permute(2, 1, 0).cpu()
            offset += len(part)
    return DensePackedColumns(values, history=view.history[window_rows].cpu())
