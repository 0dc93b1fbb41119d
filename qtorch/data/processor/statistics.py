"""Normalisation by statistics of the fit window: min-max, z-score, robust z-score."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.columns import Columns
from qtorch.data.elementwise import Affine, Clip
from qtorch.data.processor.base import (
    FieldsGroup,
    Processor,
    chosen_columns,
    in_window,
    names_of,
)
from qtorch.data.processor.cross_section import CLIP, MAD_SCALE
from qtorch.data.view import View

T = TypeVar("T")
R = TypeVar("R")
BLOCK = 16  # columns read together: one cache line where an instrument's columns lie side by side
TINY = 1e-12  # Qlib's EPS


class FittedNorm(Processor):
    """`(x - center) / scale` with both numbers of each column learnt on the fit window.

    NaN is left out of the statistics and stays NaN. Infinite values are not left out, as in
    Qlib: put ProcessInf first. The operation is applied when a column is read or gathered, so
    nothing is copied.
    """

    state_names: ClassVar[tuple[str, ...]] = ("center_", "scale_")
    columnwise: ClassVar[bool] = True

    center_: Tensor
    scale_: Tensor

    def __init__(
        self,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        fields_group: FieldsGroup = None,
    ) -> None:
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.fields_group = fields_group

    @abstractmethod
    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        """`(center, scale)` of one column's values `[M]` float32 without NaN; M may be 0."""

    def fit(self, view: View) -> None:
        seen = in_window(view, self.fit_start_time, self.fit_end_time)
        used = seen.rows.cpu().numpy()
        if not used.any():
            dates = view.calendar
            held = f"{dates[0]:%Y-%m-%d}..{dates[-1]:%Y-%m-%d}" if len(dates) else "no dates"
            raise DataError(
                f"{type(self).__name__}: the fit window {self.fit_start_time}.."
                f"{self.fit_end_time} holds no row; the data holds {held}."
            )
        chosen = chosen_columns(names_of(view), self.fields_group)
        columns: list[tuple[str, str]] = []
        found: list[tuple[float, float]] = []
        for group, names in chosen.items():
            found += _by_column(view.group(group), names, used, self)
            columns += [(group, name) for name in names]
        self.columns_ = tuple(columns)
        self.center_ = torch.tensor([c for c, _ in found], dtype=torch.float32)
        self.scale_ = torch.tensor([s for _, s in found], dtype=torch.float32)

    def __call__(self, view: View) -> View:
        for group, names in chosen_columns(names_of(view), self.fields_group).items():
            at = self._places(group, names)
            step = Affine(self.center_[at], self.scale_[at])
            view = view.with_group(group, view.group(group).with_elementwise(names, step))
        return view


class MinMaxNorm(FittedNorm):
    """`(x - min) / (max - min)` of the fit window; a constant column stays as it is."""

    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        if not len(values):
            return np.nan, np.nan
        low, high = float(values.min()), float(values.max())
        return (low, high - low) if low != high else (0.0, 1.0)


class ZScoreNorm(FittedNorm):
    """`(x - mean) / std` (ddof 0) of the fit window; a constant column stays as it is."""

    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        if not len(values):
            return np.nan, np.nan
        with np.errstate(invalid="ignore"):
            mean = float(values.mean(dtype=np.float64))
            deviation = values - np.float32(mean)
            # Around the rounded mean: its own deviation is taken out again.
            rest = float(deviation.mean(dtype=np.float64))
            square = float(np.square(deviation, out=deviation).mean(dtype=np.float64))
            std = float(np.sqrt(max(square - rest * rest, 0.0))) if square == square else np.nan
        return (mean, std) if std != 0 else (0.0, 1.0)


class RobustZScoreNorm(FittedNorm):
    """`(x - median) / (1.4826 * (MAD + 1e-12))` of the fit window, clipped to -3..3."""

    def __init__(
        self,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        fields_group: FieldsGroup = None,
        clip_outlier: bool = True,
    ) -> None:
        super().__init__(fit_start_time, fit_end_time, fields_group)
        self.clip_outlier = clip_outlier

    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        if not len(values):
            return np.nan, np.nan
        middle = _median(values)
        with np.errstate(invalid="ignore"):
            deviation = np.abs(values - middle)
        spread = _median(deviation) + np.float32(TINY)
        return float(middle), float(spread * np.float32(MAD_SCALE))

    def __call__(self, view: View) -> View:
        view = super().__call__(view)
        if not self.clip_outlier:
            return view
        for group, names in chosen_columns(names_of(view), self.fields_group).items():
            clipped = view.group(group).with_elementwise(names, Clip(-CLIP, CLIP))
            view = view.with_group(group, clipped)
        return view


def _median(values: np.ndarray) -> np.float32:
    """The median of float32 values by quickselect; the middle two averaged, as numpy does."""
    if np.isnan(values).any():
        values = values[~np.isnan(values)]  # inf - inf; np.nanmedian leaves them out too
        if not len(values):
            return np.float32(np.nan)
    half = len(values) // 2
    ordered = np.partition(values, half)
    high = ordered[half]
    if len(values) % 2:
        return np.float32(high)
    low = ordered[:half].max()
    return np.float32(high) if low == high else np.float32((low + high) * np.float32(0.5))


def _by_column(
    columns: Columns, names: Sequence[str], used: np.ndarray, norm: FittedNorm
) -> list[tuple[float, float]]:
    """The statistics of columns over the cells `used [D, N]`, a block at a time, by threads."""
    days = np.flatnonzero(used.any(1))
    rows = slice(int(days[0]), int(days[-1]) + 1)
    cells = np.flatnonzero(used[rows])
    whole = len(cells) == used[rows].size
    parts = [names[k : k + BLOCK] for k in range(0, len(names), BLOCK)]
    kept = threading.local()

    def statistics(part: Sequence[str]) -> list[tuple[float, float]]:
        if getattr(kept, "block", None) is None:
            shape = (min(BLOCK, len(names)), rows.stop - rows.start, used.shape[1])
            kept.block = torch.empty(shape, device=columns.device)
        block = columns.block(part, rows=rows, out=kept.block[: len(part)])
        out = []
        for values in block.cpu().numpy():
            flat = values.reshape(-1)
            taken = flat if whole else flat.take(cells)
            missing = np.isnan(taken)
            out.append(norm.column_statistics(taken[~missing] if missing.any() else taken))
        return out

    return [pair for found in _in_threads(statistics, parts) for pair in found]


def _in_threads(work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """`work` of every part, in order, by as many threads as torch has; one torch thread each."""
    before = torch.get_num_threads()
    if min(len(parts), before) <= 1:
        return [work(part) for part in parts]
    try:
        with ThreadPoolExecutor(
            min(len(parts), before), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(before)
