"""Gathering windows `[B, T, F]` by (date row, instrument column) pairs on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.data.panel.elementwise import FusedChain

FILLS: tuple[str, ...] = ("none", "ffill", "ffill+bfill")
# Limits of the extra memory for filled windows: bytes, or a share of the values' size.
EXTENSION_BYTES, EXTENSION_SHARE = 64 << 20, 0.25
CHUNK = 4096  # windows or instruments that are filled at once, to limit the temporary memory


class History:
    """The rows that exist, and the rows that a window shows in place of missing ones.

    Corresponds to Qlib's TSDataSampler (qlib/data/dataset/__init__.py): a window is the last
    `step_len` days *on which any instrument has a row*; a day on which this instrument has none
    is missing. "none" leaves it NaN, "ffill" takes the instrument's last earlier row inside the
    window, "ffill+bfill" then fills the missing rows before that with the window's first row.
    This concerns missing rows, not cells: a NaN in a row that exists stays.
    """

    def __init__(self, exists: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
        if exists is None:
            exists = torch.ones(shape, dtype=torch.bool)
        self.exists = exists.to(device)
        self.num_dates = shape[0]
        # Days without any row (e.g. holidays of this universe) are not part of a window: `days` are
        # the other days, and `rank [D]` is the position among them of the last one up to a day.
        # None if every day has rows (or none has).
        self.days: Tensor | None = None
        self.rank: Tensor | None = None
        has_rows = self.exists.any(1)
        if bool(has_rows.any()) and not bool(has_rows.all()):
            self.days = torch.nonzero(has_rows)[:, 0]
            self.rank = has_rows.cumsum(0) - 1

    def incomplete_windows(self, step_len: int) -> Tensor:
        """Return `[N, D]` bool: the window ending at a row is not `step_len` adjacent rows."""
        count = self.exists.to(torch.int32).cumsum(0)
        previous_count = torch.zeros_like(count)
        previous_count[step_len:] = count[:-step_len]
        return (count - previous_count != step_len).t()

    def extension(self, step_len: int) -> Extension:
        """Return what must be stored in addition so that every window is contiguous.

        Waits for the device.
        """
        incomplete = self.incomplete_windows(step_len) & self.exists.t()
        device = incomplete.device
        rank = torch.arange(self.num_dates, device=device) if self.rank is None else self.rank
        days = torch.arange(self.num_dates, device=device) if self.days is None else self.days
        first_rank = rank[self.exists.t().to(torch.int8).argmax(1)]  # [N], of the first row
        is_early = incomplete & (rank - first_rank[:, None] < step_len - 1)
        early = torch.nonzero(is_early.any(1))[:, 0]
        last_rank = (first_rank[early] + step_len - 2).clamp(max=len(days) - 1)
        instrument, date = torch.nonzero(incomplete & ~is_early, as_tuple=True)
        return Extension(
            step_len, early, last_rank, days[last_rank], rank, is_early, instrument, date
        )

    def rows(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        """Return the calendar row `[B, T]` for each step of each window; -1 if it stays missing."""
        steps = torch.arange(1 - step_len, 1, device=date.device)
        if self.days is None or self.rank is None:
            rows = date[:, None] + steps
        else:
            rank = self.rank[date][:, None] + steps
            # A rank below zero, before the first day, is missing as a row below zero is.
            rows = torch.where(rank >= 0, self.days[rank.clamp(min=0)], rank)
        is_present = (rows >= 0) & self.exists[rows.clamp(min=0), instrument[:, None]]
        rows = rows.masked_fill(~is_present, -1)
        if fill != "none":
            # Rows ascend in a window, so the largest so far is the latest.
            rows = rows.cummax(1).values
        if fill == "ffill+bfill":
            first_row = rows.masked_fill(rows < 0, self.num_dates).amin(1, keepdim=True)
            is_empty = first_row == self.num_dates
            rows = torch.where(rows < 0, first_row, rows).masked_fill(is_empty, -1)
        return rows


class Extension(NamedTuple):
    """The incomplete windows of existing rows, as they are stored behind the values.

    An instrument's first `step_len - 1` windows overlap as others do, once the rows before its
    first one are filled: they are stored as one block of `2 (step_len - 1)` rows. Every other
    incomplete window is stored by itself.

    `early [K]` are the instruments with a block, `last_rank [K]` and `last_date [K]` the last day
    of the block as a rank and as a calendar row. `rank [D]` numbers the days that have rows.
    `is_early [N, D]` marks the windows that lie in a block; `instrument` and `date` are the others.
    """

    step_len: int
    early: Tensor
    last_rank: Tensor
    last_date: Tensor
    rank: Tensor
    is_early: Tensor
    instrument: Tensor
    date: Tensor

    @property
    def block_len(self) -> int:
        """The number of rows of a block."""
        return 2 * (self.step_len - 1)

    @property
    def num_rows(self) -> int:
        """The number of stored rows; the last window is all NaN, for rows that do not exist."""
        num_windows = len(self.date) + 1
        return len(self.early) * self.block_len + num_windows * self.step_len

    def is_small(self, row_bytes: int, num_rows: int) -> bool:
        """Whether it is small beside `num_rows` rows of values of `row_bytes` each."""
        limit = max(EXTENSION_BYTES, EXTENSION_SHARE * row_bytes * num_rows)
        return self.num_rows * row_bytes <= limit


class PackedColumns(ABC):
    """Columns laid out for gathering windows on one device.

    `values` are the columns before `fused_chain`, which is applied to each batch.
    """

    source_history: Tensor | None = None  # the history given to `Columns.pack`, for sharing
    is_checked: bool = False  # whether the columns were searched for infinite values
    values: Tensor
    history: History
    fused_chain: FusedChain

    @abstractmethod
    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        """Gather windows `[B, T, F]` in ascending time; the sample's own day comes last.

        `date` and `instrument` are int64 `[B]` on the values' device. `fill` selects what replaces
        rows that do not exist (see `History`); what stays missing is NaN. The result is new memory.
        """

    def window_starts(
        self, date: Tensor, instrument: Tensor, step_len: int, fill: str
    ) -> Tensor | None:
        """Return where each window begins in memory, for `windows`.

        None if some windows are not contiguous; they must then be gathered by `gather`.
        """
        return None

    def windows(self, starts: Tensor, step_len: int) -> Tensor:
        """Return the windows `[B, T, F]` that begin at `starts`, a result of `window_starts`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no contiguous windows; use `gather` instead."
        )

    @abstractmethod
    def window_shape(self, step_len: int) -> tuple[int, int]:
        """Return `(T, F)` of the windows for a dataset's `step_len`."""

    @property
    def device(self) -> torch.device:
        """The device on which windows are gathered."""
        return self.values.device

    @property
    def num_bytes(self) -> int:
        """The size of the values, and of what is stored with them."""
        return self.values.numel() * self.values.element_size()

    @abstractmethod
    def to(self, device: torch.device, step_len: int = 1) -> PackedColumns:
        """Return a copy on another device, with room for the filled windows of `step_len`."""

    @abstractmethod
    def infinite_columns(self) -> Tensor:
        """Return `[F]` bool: columns that hold an infinity in a row that exists."""


class DensePackedColumns(PackedColumns):
    """Values `[N, D, F]`, in which a window is one contiguous piece of memory.

    If the pack owns its values (and there are no fused operations), incomplete windows are filled
    once and appended to the values, see `Extension`. `storage [rows, F]` begins with the values and
    may have room for them. Every window is then contiguous and a gather is one
    `index_select`, without any check that would make the host wait for the GPU (a window that ends
    at a row that does not exist, and is therefore no sample, is all NaN). Otherwise, or if that
    would take too much memory, incomplete windows are filled in each batch. Values may be in 16
    bits; windows are float32.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        history: Tensor | History | None = None,
        fused_chain: FusedChain | None = None,
        owns_values: bool = False,
        storage: Tensor | None = None,
        is_finite: bool = False,
    ) -> None:
        self.values = values.contiguous()
        self._is_finite = is_finite  # known in advance, so that the values need not be scanned
        self.fused_chain = fused_chain or FusedChain()
        n, d, f = self.values.shape
        if not isinstance(history, History):
            history = History(history, (d, n), values.device)
        self.history = history
        # Filled windows are appended only to values that nobody else holds, and that are final.
        self._can_append = owns_values and not len(self.fused_chain)
        self._flat = self.values.view(n * d, f)
        self._storage = self._flat if storage is None else storage
        self._starts: dict[tuple[int, str], Tensor | None] = {}
        self._incomplete_windows: dict[int, Tensor] = {}

    def window_shape(self, step_len: int) -> tuple[int, int]:
        return step_len, int(self.values.shape[2])

    @property
    def num_bytes(self) -> int:
        return self._storage.nbytes

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        check_fill(fill)
        last = instrument * self.values.shape[1] + date  # the row of the sample's own day
        starts = self._get_window_starts(step_len, fill)
        if starts is not None:
            return self._gather_contiguous(starts.index_select(0, last), step_len)
        if step_len > self.values.shape[1] or self.values.is_cuda:
            # On a GPU, looking for incomplete windows would make the host wait.
            return self._gather_by_row(date, instrument, step_len, fill)
        # Gather all windows as if they were complete, then overwrite those that are not.
        x = self.fused_chain(
            self._gather_contiguous((last - (step_len - 1)).clamp_(min=0), step_len)
        )
        incomplete = torch.nonzero(self._get_incomplete(step_len)[last])[:, 0]
        if incomplete.numel():
            pairs = date[incomplete], instrument[incomplete]
            x.index_copy_(0, incomplete, self._gather_by_row(*pairs, step_len, fill))
        return x

    def window_starts(
        self, date: Tensor, instrument: Tensor, step_len: int, fill: str
    ) -> Tensor | None:
        check_fill(fill)
        starts = self._get_window_starts(step_len, fill)
        if starts is None:
            return None
        return starts.index_select(0, instrument * self.values.shape[1] + date)

    def windows(self, starts: Tensor, step_len: int) -> Tensor:
        return self._gather_contiguous(starts, step_len)

    def _gather_contiguous(self, first: Tensor, step_len: int) -> Tensor:
        """Gather the `step_len` rows that begin at each of `first`."""
        f = self.values.shape[2]
        count = self._flat.shape[0] - step_len + 1
        # A view of all windows, one a row, which overlap in memory.
        windows = self._flat.as_strided((count, step_len * f), (f, 1), self._flat.storage_offset())
        return windows.index_select(0, first).view(-1, step_len, f).to(torch.float32)

    def _gather_by_row(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        """Gather windows row by row, with missing rows filled or NaN."""
        rows = self.history.rows(date, instrument, step_len, fill)
        flat_rows = instrument[:, None] * self.values.shape[1] + rows.clamp(min=0)
        x = self._flat.index_select(0, flat_rows.reshape(-1)).view(*rows.shape, -1)
        x = x.to(torch.float32)
        return self.fused_chain(x).masked_fill_((rows < 0)[..., None], torch.nan)

    def _get_incomplete(self, step_len: int) -> Tensor:
        """Return `[N * D]` bool: the window ending at a row is incomplete."""
        if step_len not in self._incomplete_windows:
            incomplete = self.history.incomplete_windows(step_len)
            self._incomplete_windows[step_len] = incomplete.reshape(-1)
        return self._incomplete_windows[step_len]

    def _get_window_starts(self, step_len: int, fill: str) -> Tensor | None:
        """Return where each window begins, `[N * D]`; None if some are not contiguous."""
        if (step_len, fill) not in self._starts:
            self._starts[step_len, fill] = (
                self._append_filled_windows(step_len, fill) if self._can_append else None
            )
        return self._starts[step_len, fill]

    def _append_filled_windows(self, step_len: int, fill: str) -> Tensor | None:
        """Append the filled incomplete windows to the values; None if they need too much memory."""
        n, d, f = self.values.shape
        extension = self.history.extension(step_len)
        num_rows = self._flat.shape[0]
        if not extension.is_small(f * self.values.element_size(), n * d):
            return None
        flat = self._extend_storage(num_rows + extension.num_rows)
        first_window = num_rows + len(extension.early) * extension.block_len
        flat[-step_len:] = torch.nan
        self._write_windows(
            flat[num_rows:first_window],
            (extension.last_date, extension.early),
            extension.block_len,
            fill,
        )
        self._write_windows(
            flat[first_window:-step_len], (extension.date, extension.instrument), step_len, fill
        )
        starts = torch.arange(n * d, device=flat.device).view(n, d) - (step_len - 1)
        starts[self.history.incomplete_windows(step_len)] = len(flat) - step_len
        # A window's place in its instrument's block depends on the days to the block's end.
        block_end = torch.zeros(n, dtype=torch.int64, device=flat.device)
        blocks = torch.arange(len(extension.early), device=flat.device) * extension.block_len
        block_end[extension.early] = num_rows + blocks + step_len - 2 - extension.last_rank
        starts = torch.where(extension.is_early, block_end[:, None] + extension.rank, starts)
        windows = torch.arange(len(extension.date), device=flat.device) * step_len
        starts[extension.instrument, extension.date] = first_window + windows
        self._flat, self.values = flat, flat[: n * d].view(n, d, f)
        return starts.reshape(-1).to(torch.int32 if len(flat) < 2**31 else torch.int64)

    def _extend_storage(self, num_rows: int) -> Tensor:
        """Return memory of `num_rows` rows that begins with what is stored now."""
        if len(self._storage) < num_rows:
            storage = self._storage.new_empty((num_rows, self._flat.shape[1]))
            storage[: len(self._flat)] = self._flat
            self._storage = storage
        return self._storage[:num_rows]

    def _write_windows(
        self, target: Tensor, pairs: tuple[Tensor, Tensor], step_len: int, fill: str
    ) -> None:
        """Write the filled windows that end at the pairs (date, instrument), one after another."""
        date, instrument = pairs
        for first in range(0, len(date), CHUNK):
            part = slice(first, first + CHUNK)
            windows = self._gather_by_row(date[part], instrument[part], step_len, fill)
            target[first * step_len :][: len(windows) * step_len] = windows.flatten(0, 1)

    def to(self, device: torch.device, step_len: int = 1) -> PackedColumns:
        n, d, f = self.values.shape
        history = History(self.history.exists, (d, n), device)
        storage = allocate_storage(self.values.shape, device, history, step_len, self.values.dtype)
        values = storage[: n * d].view(n, d, f)
        values.copy_(self.values)
        fused_chain = self.fused_chain.to(device)
        if len(fused_chain):
            for first in range(0, len(values), CHUNK):
                values[first : first + CHUNK] = fused_chain(values[first : first + CHUNK])
        return DensePackedColumns(values, history=history, owns_values=True, storage=storage)

    def infinite_columns(self) -> Tensor:
        n, _, f = self.values.shape
        has_infinity = torch.zeros(f, dtype=torch.bool, device=self.device)
        if self._is_finite:
            return has_infinity
        for first in range(0, n, 16):
            part = self.values[first : first + 16]
            if not bool(part.isinf().any()):
                continue  # fitted scales are not zero: the chain keeps finite values finite
            is_infinite = self.fused_chain(part.clone()).isinf()
            is_infinite &= self.history.exists[:, first : first + 16].t()[..., None]
            has_infinity |= is_infinite.flatten(0, 1).any(0)
        return has_infinity


def allocate_storage(
    shape: tuple[int, ...],
    device: torch.device,
    history: History,
    step_len: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Allocate the storage of values `[N, D, F]`, with room for filled windows of `step_len`."""
    n, d, f = shape
    num_rows = n * d
    if step_len > 1:
        extension = history.extension(step_len)
        if extension.is_small(dtype.itemsize * f, num_rows):
            num_rows += extension.num_rows
    return torch.empty(num_rows, f, device=device, dtype=dtype)


def check_fill(fill: str) -> None:
    """Raise ConfigError for a fill that is not one of Qlib's three."""
    if fill not in FILLS:
        raise ConfigError(unknown_name_message("fillna_type", fill, FILLS))
