"""Windows by index: `[B, T, F]` for pairs of (date row, instrument column), on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.elementwise import Fused

Fill = Literal["none", "ffill", "ffill+bfill"]
FILLS: tuple[str, ...] = ("none", "ffill", "ffill+bfill")
NAN = float("nan")
# What the filled windows of a pack may take beside its values.
EXTENSION_BYTES, EXTENSION_SHARE = 64 << 20, 0.25
PIECE = 4096


class History:
    """Which rows exist, and what stands in a window for those that do not.

    Answers to Qlib's TSDataSampler (qlib/data/dataset/__init__.py): a window is the last
    `step_len` days *on which any instrument has a row*; a day on which this instrument has none
    is missing. "none" leaves it NaN, "ffill" takes the instrument's last row before it inside
    the window, "ffill+bfill" then takes the window's first row for what is missing before that.
    Missing are rows, not cells: a NaN in a row that exists stays.
    """

    def __init__(self, exists: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
        if exists is None:
            exists = torch.ones(shape, dtype=torch.bool)
        self.exists = exists.to(device)
        self.num_dates = shape[0]
        # Days without any row (a holiday of this universe) are not part of a window.
        self.days: Tensor | None = None
        self.rank: Tensor | None = None
        occupied = self.exists.any(1)
        if bool(occupied.any()) and not bool(occupied.all()):
            self.days = torch.nonzero(occupied)[:, 0]
            self.rank = occupied.cumsum(0) - 1

    def incomplete(self, step_len: int) -> Tensor:
        """`[N, D]` bool: the window that ends at a row is not `step_len` adjacent rows."""
        count = self.exists.to(torch.int32).cumsum(0)
        shifted = torch.zeros_like(count)
        shifted[step_len:] = count[:-step_len]
        return (count - shifted != step_len).t()

    def rows(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        """The calendar row `[B, T]` behind each step of each window; -1 where it stays missing."""
        steps = torch.arange(1 - step_len, 1, device=date.device)
        if self.days is None or self.rank is None:
            rows = date[:, None] + steps
        else:
            place = self.rank[date][:, None] + steps
            rows = torch.where(place >= 0, self.days[place.clamp(min=0)], place)
        there = (rows >= 0) & self.exists[rows.clamp(min=0), instrument[:, None]]
        rows = rows.masked_fill(~there, -1)
        if fill != "none":
            rows = rows.cummax(1).values  # rows ascend in a window: the largest yet is the latest
        if fill == "ffill+bfill":
            first = rows.masked_fill(rows < 0, self.num_dates).amin(1, keepdim=True)
            rows = torch.where(rows < 0, first, rows).masked_fill(first == self.num_dates, -1)
        return rows


class Packed(ABC):
    """Columns laid out for gathering windows on one device."""

    source_history: Tensor | None = None
    checked: bool = False
    values: Tensor
    history: History
    fused: Fused

    @abstractmethod
    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        """Windows `[B, T, F]`, time ascending, the sample's own day last.

        `date` and `instrument` are int64 `[B]` on the values' device. `fill` says what stands
        for rows that do not exist (see `History`); what stays missing is NaN. The result is new
        memory.
        """

    def begins(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor | None:
        """Where in memory each window begins, for `windows`; None where not all of them lie in
        one piece, and `gather` it must be."""
        return None

    def windows(self, begin: Tensor, step_len: int) -> Tensor:
        """The windows `[B, T, F]` that begin there."""
        raise NotImplementedError(
            f"{type(self).__name__} has no windows in one piece: `begins` gives None, gather them."
        )

    @abstractmethod
    def window_shape(self, step_len: int) -> tuple[int, int]:
        """`(T, F)` of the windows for a dataset's `step_len`."""

    @property
    def device(self) -> torch.device:
        """Where windows are gathered."""
        return self.values.device

    @property
    def num_bytes(self) -> int:
        """What the values take."""
        return self.values.numel() * self.values.element_size()

    @abstractmethod
    def to(self, device: torch.device) -> Packed:
        """The same on another device."""

    @abstractmethod
    def infinite(self) -> Tensor:
        """`[F]` bool: columns that hold an infinity in a row that exists."""


class DensePacked(Packed):
    """`[N, D, F]` values: a window is one contiguous piece of memory.

    Where the values are the pack's `own` (with nothing fused), the incomplete windows are filled
    once and stand behind them, so that every window is contiguous and a gather is one
    `index_select`, without a question that a GPU's host would wait for (a window that ends at
    a row that does not exist, and so is no sample, is all NaN then). Otherwise, or where that
    would take too much memory, incomplete windows are mended batch by batch.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        history: Tensor | None = None,
        fused: Fused | None = None,
        own: bool = False,
        finite: bool = False,
    ) -> None:
        self.values = values.contiguous()
        self._finite = finite  # known without a look
        self.fused = fused or Fused()
        n, d, f = self.values.shape
        self.history = History(history, (d, n), values.device)
        self._own = own and not len(self.fused)
        self._flat = self.values.view(n * d, f)
        self._starts: dict[tuple[int, str], Tensor | None] = {}
        self._flags: dict[int, Tensor] = {}

    def window_shape(self, step_len: int) -> tuple[int, int]:
        return step_len, int(self.values.shape[2])

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        check_fill(fill)
        last = instrument * self.values.shape[1] + date
        starts = self._starts_of(step_len, fill)
        if starts is not None:
            return self._contiguous(starts.index_select(0, last), step_len)
        if step_len > self.values.shape[1] or self.values.is_cuda:
            # On a GPU, finding the incomplete windows would make the host wait.
            return self._remapped(date, instrument, step_len, fill)
        x = self.fused(self._contiguous((last - (step_len - 1)).clamp_(min=0), step_len))
        incomplete = torch.nonzero(self._incomplete(step_len)[last])[:, 0]
        if incomplete.numel():
            at = date[incomplete], instrument[incomplete]
            x.index_copy_(0, incomplete, self._remapped(*at, step_len, fill))
        return x

    def begins(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor | None:
        check_fill(fill)
        starts = self._starts_of(step_len, fill)
        if starts is None:
            return None
        return starts.index_select(0, instrument * self.values.shape[1] + date)

    def windows(self, begin: Tensor, step_len: int) -> Tensor:
        return self._contiguous(begin, step_len)

    def _contiguous(self, first: Tensor, step_len: int) -> Tensor:
        """`step_len` rows from each of `first`: one row of an overlapping `[.., T * F]` view."""
        f = self.values.shape[2]
        count = self._flat.shape[0] - step_len + 1
        windows = self._flat.as_strided((count, step_len * f), (f, 1), self._flat.storage_offset())
        return windows.index_select(0, first).view(-1, step_len, f)

    def _remapped(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        """Windows row by row, with what is missing filled or NaN."""
        rows = self.history.rows(date, instrument, step_len, fill)
        at = instrument[:, None] * self.values.shape[1] + rows.clamp(min=0)
        x = self._flat.index_select(0, at.reshape(-1)).view(*rows.shape, -1)
        return self.fused(x).masked_fill_((rows < 0)[..., None], NAN)

    def _incomplete(self, step_len: int) -> Tensor:
        if step_len not in self._flags:
            self._flags[step_len] = self.history.incomplete(step_len).reshape(-1)
        return self._flags[step_len]

    def _starts_of(self, step_len: int, fill: str) -> Tensor | None:
        """`[N * D]`: where each window begins in the storage; None where not every one does."""
        if (step_len, fill) not in self._starts:
            self._starts[step_len, fill] = self._extend(step_len, fill) if self._own else None
        return self._starts[step_len, fill]

    def _extend(self, step_len: int, fill: str) -> Tensor | None:
        """Put the filled incomplete windows behind the values; None where they are too many."""
        n, d, f = self.values.shape
        incomplete = self.history.incomplete(step_len)
        who, date = torch.nonzero(incomplete & self.history.exists.t(), as_tuple=True)
        size = (len(date) + 1) * step_len * f * self.values.element_size()
        if size > max(EXTENSION_BYTES, EXTENSION_SHARE * self.num_bytes):
            return None
        old = self._flat.shape[0]
        # The last of them is all NaN, for rows that do not exist.
        flat = self.values.new_full((old + (len(date) + 1) * step_len, f), NAN)
        flat[:old] = self._flat
        for first in range(0, len(date), PIECE):
            part = slice(first, first + PIECE)
            filled = self._remapped(date[part], who[part], step_len, fill).flatten(0, 1)
            flat[old + first * step_len :][: len(filled)] = filled
        starts = torch.arange(n * d, device=flat.device).view(n, d) - (step_len - 1)
        starts[incomplete] = old + len(date) * step_len
        starts[who, date] = old + torch.arange(len(date), device=flat.device) * step_len
        self._flat, self.values = flat, flat[: n * d].view(n, d, f)
        return starts.reshape(-1).to(torch.int32 if len(flat) < 2**31 else torch.int64)

    def to(self, device: torch.device) -> Packed:
        values = self.values.to(device, copy=True)
        fused = self.fused.to(device)
        if len(fused):
            for first in range(0, len(values), PIECE):
                values[first : first + PIECE] = fused(values[first : first + PIECE])
        return DensePacked(values, history=self.history.exists, own=True)

    def infinite(self) -> Tensor:
        n, _, f = self.values.shape
        found = torch.zeros(f, dtype=torch.bool, device=self.device)
        for first in range(0, 0 if self._finite else n, 16):
            part = self.values[first : first + 16]
            if not bool(part.isinf().any()):
                continue
            x = self.fused(part.clone()).isinf()
            x &= self.history.exists[:, first : first + 16].t()[..., None]
            found |= x.flatten(0, 1).any(0)
        return found


def check_fill(fill: str) -> None:
    """Refuse a fill that is none of Qlib's three."""
    if fill not in FILLS:
        raise ConfigError(unknown_name("fillna_type", fill, FILLS))


def infinite_message(names: list[str], what: str) -> str:
    """The error for infinities that survived processing."""
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return (
        f"infinite values in the {what}: {shown}. Put ProcessInf before the other processors, "
        "or mend the expression (a division by zero?)."
    )
