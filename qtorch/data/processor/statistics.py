"""Normalization with statistics of the fit window: min-max, z-score, and robust z-score."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.panel.columns import COLUMNS_AT_ONCE, Columns, column_parts
from qtorch.data.panel.elementwise import Affine, Clip
from qtorch.data.panel.panel import coverage_dates
from qtorch.data.panel.view import View
from qtorch.data.processor.base import FieldsGroup, Processor, select_dates
from qtorch.data.processor.cross_section import CLIP, MAD_SCALE
from qtorch.data.threads import map_threads

TINY = 1e-12  # Qlib's EPS


class FittedNorm(Processor):
    """Computes `(x - center) / scale` with two statistics per column, fitted on the fit window.

    NaN is ignored by the statistics and stays NaN. Infinite values are not ignored, as in Qlib:
    put ProcessInf first. The operation is applied when a column is read or gathered, so no data
    is copied.
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
        """Compute `(center, scale)` of a column's `values [M]` float32 without NaN; M may be 0."""

    def fit(self, view: View) -> None:
        fit_view = select_dates(view, self.fit_start_time, self.fit_end_time)
        used = fit_view.rows.cpu().numpy()
        if not used.any():
            raise DataError(
                f"{type(self).__name__}: the fit window {self.fit_start_time}.."
                f"{self.fit_end_time} has no rows; the data has {coverage_dates(view.calendar)}."
            )
        columns: list[tuple[str, str]] = []
        statistics: list[tuple[float, float]] = []
        for group, names in self.select_columns(view).items():
            statistics += _column_statistics(view.group(group), names, used, self)
            columns += [(group, name) for name in names]
        self.columns_ = tuple(columns)
        self.center_ = torch.tensor([c for c, _ in statistics], dtype=torch.float32)
        self.scale_ = torch.tensor([s for _, s in statistics], dtype=torch.float32)

    def __call__(self, view: View) -> View:
        for group, names in self.select_columns(view).items():
            positions = self._get_positions(group, names)
            step = Affine(self.center_[positions], self.scale_[positions])
            view = view.with_group(group, view.group(group).with_elementwise(names, step))
        return view


class MinMaxNorm(FittedNorm):
    """Computes `(x - min) / (max - min)`; a column that is constant in the fit window is kept."""

    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        if not len(values):
            return np.nan, np.nan
        low, high = float(values.min()), float(values.max())
        return (low, high - low) if low != high else (0.0, 1.0)


class ZScoreNorm(FittedNorm):
    """Computes `(x - mean) / std` (ddof 0); a column that is constant in the fit window is kept."""

    def column_statistics(self, values: np.ndarray) -> tuple[float, float]:
        if not len(values):
            return np.nan, np.nan
        with np.errstate(invalid="ignore"):
            mean = float(values.mean(dtype=np.float64))
            deviation = values - np.float32(mean)
            # The mean was rounded to float32, so subtract the remaining mean of the deviations.
            rounding = float(deviation.mean(dtype=np.float64))
            square = float(np.square(deviation, out=deviation).mean(dtype=np.float64))
            # Not max(..., 0), which would turn NaN into 0.
            std = float(np.sqrt(np.maximum(square - rounding * rounding, 0.0)))
        return (mean, std) if std != 0 else (0.0, 1.0)


class RobustZScoreNorm(FittedNorm):
    """Computes `(x - median) / (1.4826 * (MAD + 1e-12))`, clipped to -3..3."""

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
        for group, names in self.select_columns(view).items():
            new_columns = view.group(group).with_elementwise(names, Clip(-CLIP, CLIP))
            view = view.with_group(group, new_columns)
        return view


def _median(values: np.ndarray) -> np.float32:
    """Compute the median of float32 values by quickselect; average the middle two, as numpy."""
    if np.isnan(values).any():
        values = values[~np.isnan(values)]  # NaN comes from inf - inf; np.nanmedian ignores it too
        if not len(values):
            return np.float32(np.nan)
    half = len(values) // 2
    partition = np.partition(values, half)
    high = partition[half]
    if len(values) % 2:
        return np.float32(high)
    low = partition[:half].max()
    return np.float32(high) if low == high else np.float32((low + high) * np.float32(0.5))


def _column_statistics(
    columns: Columns, names: Sequence[str], used: np.ndarray, norm: FittedNorm
) -> list[tuple[float, float]]:
    """Compute the statistics of columns over the cells `used [D, N]`, by blocks in threads."""
    days = np.flatnonzero(used.any(1))
    rows = slice(int(days[0]), int(days[-1]) + 1)
    cells = np.flatnonzero(used[rows])
    is_full = len(cells) == used[rows].size
    parts = column_parts(names)
    buffers = threading.local()

    def statistics(part: Sequence[str]) -> list[tuple[float, float]]:
        if getattr(buffers, "block", None) is None:
            shape = (min(COLUMNS_AT_ONCE, len(names)), rows.stop - rows.start, used.shape[1])
            buffers.block = torch.empty(shape, device=columns.device)
        block = columns.block(part, rows=rows, out=buffers.block[: len(part)])
        out = []
        for values in block.cpu().numpy():
            flat = values.reshape(-1)
            selection = flat if is_full else flat.take(cells)
            missing = np.isnan(selection)
            out.append(norm.column_statistics(selection[~missing] if missing.any() else selection))
        return out

    num_threads = min(len(parts), torch.get_num_threads())
    # A single part is read faster with all of torch's threads.
    results = (
        map_threads(statistics, parts, num_threads)
        if num_threads > 1
        else [statistics(part) for part in parts]
    )
    return [pair for part_statistics in results for pair in part_statistics]
