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


class History:
    """Which rows exist, and what stands in a window for those that do not.

    Answers to Qlib's TSDataSampler (qlib/data/dataset/__init__.py): a window is the last
    `step_len` days *on which any instrument has a row*; a day on which this instrument has none
    is missing. "none" leaves it NaN, "ffill" takes the instrument's last row before it inside
    the window, "ffill+bfill" then takes the window's first row for what is missing before that.
    Missing are rows, not cells: a NaN in a row that exists stays.
    """

    def __init__(self, exists: Tensor | None, num_dates: int, device: torch.device) -> None:
        self.exists = None if exists is None else exists.to(device)
        self.num_dates = num_dates
        # Days without any row (a holiday of this universe) are not part of a window.
        self.days: Tensor | None = None
        self.rank: Tensor | None = None
        if self.exists is not None and self.exists.numel():
            occupied = self.exists.any(1)
            if not bool(occupied.all()):
                self.days = torch.nonzero(occupied)[:, 0]
                self.rank = occupied.cumsum(0) - 1
        self._complete: dict[int, tuple[Tensor, bool]] = {}

    def complete(self, step_len: int) -> Tensor:
        """`[N * D]` bool, instrument by instrument: the window that ends here misses nothing."""
        return self._completeness(step_len)[0]

    def all_complete(self, step_len: int, date: Tensor, instrument: Tensor) -> bool:
        """Whether none of these windows misses a row (reads one number from the device)."""
        flags = self.complete(step_len)
        return bool(flags[instrument * self.num_dates + date].all())

    def _completeness(self, step_len: int) -> tuple[Tensor, bool]:
        found = self._complete.get(step_len)
        if found is None:
            flags = self._flags(step_len)
            found = self._complete[step_len] = (flags, bool(flags.all()))
        return found

    def _flags(self, step_len: int) -> Tensor:
        if self.exists is None:
            raise AssertionError("flags are asked for only where rows may be missing")
        count = self.exists.to(torch.int32).cumsum(0)
        shifted = torch.zeros_like(count)
        if step_len < self.num_dates:
            shifted[step_len:] = count[:-step_len]
        return (count - shifted == step_len).t().reshape(-1)

    def rows(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        """The calendar row `[B, T]` behind each step of each window; -1 where it stays missing."""
        steps = torch.arange(1 - step_len, 1, device=date.device)
        if self.days is None or self.rank is None:
            rows = date[:, None] + steps
        else:
            place = self.rank[date][:, None] + steps
            rows = torch.where(place >= 0, self.days[place.clamp(min=0)], place)
        there = rows >= 0
        if self.exists is not None:
            there = there & self.exists[rows.clamp(min=0), instrument[:, None]]
        rows = rows.masked_fill(~there, -1)
        if fill == "none":
            return rows
        rows = rows.cummax(1).values  # rows ascend in a window: the largest yet is the latest
        if fill == "ffill":
            return rows
        first = rows.masked_fill(rows < 0, self.num_dates).amin(1, keepdim=True)
        first = first.masked_fill(first == self.num_dates, -1)
        return torch.where(rows < 0, first, rows)


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

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F of the windows."""

    def num_steps(self, step_len: int) -> int:
        """T of the windows for a dataset's `step_len`."""
        return step_len

    def features_of(self, step_len: int) -> int:
        """F of the windows for a dataset's `step_len`."""
        return self.num_features

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
    """`[N, D, F]` values: a window is one contiguous piece of memory."""

    def __init__(
        self,
        values: Tensor,
        *,
        history: Tensor | None = None,
        fused: Fused | None = None,
    ) -> None:
        self.values = values.contiguous()
        self.fused = fused or Fused()
        n, d, f = self.values.shape
        self.history = History(history, d, values.device)
        self._flat = self.values.reshape(n * d, f)

    @property
    def num_features(self) -> int:
        return int(self.values.shape[2])

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        check_fill(fill)
        d = self.values.shape[1]
        last = instrument * d + date
        if self.history.exists is None and step_len == 1:
            return self.fused(self._flat.index_select(0, last)[:, None])
        if step_len > d or self.values.is_cuda or self.history.exists is None:
            # On a GPU the remapped gather costs what the plain one does, and finding the
            # incomplete windows would make the host wait.
            return self._remapped(date, instrument, step_len, fill)
        x = self._contiguous(last, step_len)
        incomplete = torch.nonzero(~self.history.complete(step_len)[last])[:, 0]
        if not incomplete.numel():
            return self.fused(x)
        if incomplete.numel() == len(last):
            return self._remapped(date, instrument, step_len, fill)
        mended = self._remapped(date[incomplete], instrument[incomplete], step_len, fill)
        x = self.fused(x)
        x[incomplete] = mended
        return x

    def _contiguous(self, last: Tensor, step_len: int) -> Tensor:
        """Windows as if nothing were missing: one row of an overlapping `[.., T * F]` view."""
        f = self.num_features
        count = self._flat.shape[0] - step_len + 1
        windows = self._flat.as_strided((count, step_len * f), (f, 1), self._flat.storage_offset())
        first = (last - (step_len - 1)).clamp_(min=0)
        return windows.index_select(0, first).view(-1, step_len, f)

    def _remapped(self, date: Tensor, instrument: Tensor, step_len: int, fill: str) -> Tensor:
        rows = self.history.rows(date, instrument, step_len, fill)
        at = instrument[:, None] * self.values.shape[1] + rows.clamp(min=0)
        x = self._flat.index_select(0, at.reshape(-1)).view(*rows.shape, -1)
        return self.fused(x).masked_fill_((rows < 0)[..., None], NAN)

    def to(self, device: torch.device) -> Packed:
        return DensePacked(
            self.values.to(device), history=self.history.exists, fused=self.fused.to(device)
        )

    def infinite(self) -> Tensor:
        n, _, f = self.values.shape
        found = torch.zeros(f, dtype=torch.bool, device=self.device)
        for first in range(0, n, 16):
            part = self.values[first : first + 16]
            if not bool(part.isinf().any()):
                continue
            x = self.fused(part.clone()).isinf()
            if self.history.exists is not None:
                x &= self.history.exists[:, first : first + 16].t()[..., None]
            found |= x.flatten(0, 1).any(0)
        return found


def check_fill(fill: str) -> None:
    """Refuse a fill that is none of Qlib's three."""
    if fill not in FILLS:
        raise ConfigError(unknown_name("fillna_type", fill, FILLS))
