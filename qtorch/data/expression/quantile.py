"""Rolling quantiles and medians with linear interpolation."""

from __future__ import annotations

import bisect
from math import floor

import numpy as np
import torch
from torch import Tensor

from qtorch.data.expression.machine import Executor, Kernel
from qtorch.data.expression.network import build_program, run_program
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series

_MAX_NETWORK_WINDOW = 256  # merging networks of longer windows have many thousand steps
_MAX_PARTIAL = 0.04  # fraction of partial windows up to which sorting each of them is faster
_INFINITE = float("inf")

Levels = dict[int, tuple[float, ...]]
Quantiles = dict[tuple[int, float], Tensor]


def _quantile(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    level = float(step.constants[1]) if step.operator == "Quantile" else 0.5
    quantiles = series.quantiles
    if quantiles is None:
        levels_by_window: dict[int, set[float]] = {}
        for (key, w), levels in executor.plan.quantile_levels.items():
            if key == step.inputs:
                levels_by_window.setdefault(executor.block.clip_window(w), set()).update(levels)
        quantiles = series.quantiles = _compute_quantiles(
            series, {w: tuple(s) for w, s in levels_by_window.items()}
        )
    return executor.block.mask_outside_span(quantiles[window, level].to(step.dtype, copy=True))


def _compute_quantiles(series: Series, levels_by_window: Levels) -> Quantiles:
    """Compute all quantiles of a series that the plan needs: `[D, n]` by window and level."""
    long_windows = {w: levels for w, levels in levels_by_window.items() if w > _MAX_NETWORK_WINDOW}
    short_windows = {
        w: levels for w, levels in levels_by_window.items() if w <= _MAX_NETWORK_WINDOW
    }
    quantiles = _insertion_quantiles(series, long_windows) if long_windows else {}
    if short_windows:
        partial_fraction = max(
            _partial_windows(series, w).mean(dtype=torch.float32).item() for w in short_windows
        )
        quantiles |= (
            _full_window_quantiles(series, short_windows)
            if partial_fraction <= _MAX_PARTIAL
            else _partial_window_quantiles(series, short_windows)
        )
    return quantiles


def _partial_windows(series: Series, window: int) -> Tensor:
    """Return `[D, n]` bool: windows in which some but not all values are missing."""
    n = series.rows.count(window)
    block = series.block
    return ((n < window) & (n > 0)).expand(block.num_rows, block.num_columns)


def _pad_values(series: Series, window: int) -> Tensor:
    """Add `window - 1` rows before the values; these rows and missing values are infinite."""
    values = series.numbers
    if not series.rows.is_dense or series.rows.num_leading_nans:
        values = torch.nan_to_num(values, nan=_INFINITE)
    return torch.cat([values.new_full((window - 1, values.shape[1]), _INFINITE), values])


# -- nearly all windows are full, so that quantiles have fixed positions ---------------------------


def _full_window_quantiles(series: Series, levels_by_window: Levels) -> Quantiles:
    window_positions = []
    for w in sorted(levels_by_window):
        positions = {k for s in levels_by_window[w] for k in _quantile_positions(s, w)}
        window_positions.append((w, tuple(sorted(positions))))
    longest = max(levels_by_window)
    padded_values = _pad_values(series, longest)
    sorted_windows = run_program(build_program(tuple(window_positions)), padded_values)
    quantiles: Quantiles = {}
    for w, levels in levels_by_window.items():
        cells = _partial_windows(series, w).nonzero(as_tuple=True)
        sorted_values = _sort_windows(padded_values, cells, w, longest)
        n = series.rows.count(w).expand(series.values.shape)[cells]
        rows = slice(longest - w, None)
        for level in levels:
            low, *high = (sorted_windows[w][k][rows] for k in _quantile_positions(level, w))
            part = level * (w - 1) - floor(level * (w - 1))
            value = torch.lerp(low, high[0], part) if high else low.clone()
            value[cells] = _interpolate(sorted_values, n, level).to(value.dtype)
            quantiles[w, level] = series.rows.mask_empty(value, w)
    return quantiles


def _quantile_positions(level: float, n: int) -> tuple[int, ...]:
    """Return the one or two sorted positions that the quantile of n values depends on."""
    position = level * (n - 1)
    low = floor(position)
    return (low,) if low == position else (low, low + 1)


def _sort_windows(
    padded_values: Tensor, cells: tuple[Tensor, ...], window: int, longest: int
) -> Tensor:
    """Sort the windows of the given cells: `[M, window]`."""
    rows, columns = cells
    steps = torch.arange(longest - window, longest, device=padded_values.device)
    return padded_values[rows[:, None] + steps, columns[:, None]].sort(-1).values


def _interpolate(sorted_values: Tensor, n: Tensor, level: float) -> Tensor:
    """Compute the quantile of the first `n` sorted values of each row, float64."""
    position = level * (n - 1)
    low = position.floor()
    part, low = position - low, low.to(torch.int64)
    high = (low + 1).clamp(max=sorted_values.shape[1] - 1)
    below = sorted_values.gather(1, low[:, None])[:, 0].to(torch.float64)
    above = sorted_values.gather(1, high[:, None])[:, 0].to(torch.float64)
    return torch.where(part > 0, below + (above - below) * part, below)


# -- many windows are partial, so that positions depend on the cell --------------------------------


def _partial_window_quantiles(series: Series, levels_by_window: Levels) -> Quantiles:
    longest = max(levels_by_window)
    window_positions = []
    for w in sorted(levels_by_window):
        highest = max(_quantile_positions(max(levels_by_window[w]), w))
        window_positions.append((w, tuple(range(highest + 1))))
    sorted_windows = run_program(
        build_program(tuple(window_positions)), _pad_values(series, longest)
    )
    quantiles: Quantiles = {}
    for w, levels in levels_by_window.items():
        n = series.rows.count(w).expand(series.values.shape)
        stack = torch.stack(
            [sorted_windows[w].pop(k)[longest - w :] for k in sorted(sorted_windows[w])]
        )
        for level in levels:
            position = level * (n - 1).clamp(min=0)
            low = position.floor()
            part, low = position - low, low.to(torch.int64)
            high = (low + (part > 0)).clamp(max=len(stack) - 1)
            below = stack.gather(0, low[None])[0].to(torch.float64)
            above = stack.gather(0, high[None])[0].to(torch.float64)
            # All values of an empty window are infinite, and inf - inf is NaN.
            quantiles[w, level] = below + (above - below) * part
    return quantiles


# -- long windows ----------------------------------------------------------------------------------


def _insertion_quantiles(series: Series, levels_by_window: Levels) -> Quantiles:
    """Keep one sorted list per instrument on the CPU, and insert and remove a value per row."""
    values = series.numbers.to(torch.float64).cpu().numpy()
    out = {
        (w, s): np.full(values.shape, np.nan)
        for w, levels in levels_by_window.items()
        for s in levels
    }
    for window, levels in levels_by_window.items():
        for column in range(values.shape[1]):
            sorted_values: list[float] = []
            column_values = values[:, column].tolist()
            results = [out[window, s][:, column] for s in levels]
            for row, value in enumerate(column_values):
                if value == value:
                    bisect.insort(sorted_values, value)
                old = column_values[row - window] if row >= window else float("nan")
                if old == old:
                    del sorted_values[bisect.bisect_left(sorted_values, old)]
                if sorted_values:
                    for level, result in zip(levels, results, strict=True):
                        low, *high = (
                            sorted_values[k] for k in _quantile_positions(level, len(sorted_values))
                        )
                        part = level * (len(sorted_values) - 1) % 1
                        result[row] = low + (high[0] - low) * part if high else low
    device = series.values.device
    return {key: torch.from_numpy(result).to(device) for key, result in out.items()}


KERNELS: dict[str, Kernel] = {"Quantile": _quantile, "Med": _quantile}
