"""Rolling operators based on order: extremes, their positions, and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.chain import rolling_extremes
from qtorch.data.expression.machine import Executor, Kernel
from qtorch.data.expression.plan import Step, window_chain
from qtorch.data.expression.series import Series

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def _extreme_kernel(*, largest: bool) -> Kernel:
    family = "max" if largest else "min"
    fill_value = float("-inf") if largest else float("inf")

    def build(series: Series) -> dict[int, Tensor]:
        base = series.numbers
        if not series.rows.is_dense or series.rows.num_leading_nans:
            base = torch.nan_to_num(base, nan=fill_value)
        return rolling_extremes(base, series.windows(family), largest=largest)

    def kernel(executor: Executor, step: Step) -> Tensor:
        series, window = executor.get_series(step), executor.get_window(step)
        extremes = series.build_once(family, build)[window]
        return executor.block.mask_outside_span(series.rows.mask_empty(extremes.clone(), window))

    return kernel


def _position_kernel(*, largest: bool) -> Kernel:
    family = "argmax" if largest else "argmin"

    def kernel(executor: Executor, step: Step) -> Tensor:
        series, window = executor.get_series(step), executor.get_window(step)
        row = series.build_once(family, lambda s: _extreme_rows(s, family, largest))[window]
        position = row - (executor.block.first_rows(window) - 1).to(torch.float32)
        return executor.block.mask_outside_span(series.rows.mask_empty(position, window), head=True)

    return kernel


def _extreme_rows(series: Series, family: str, largest: bool) -> dict[int, Tensor]:
    """Return the row `[D, n]` float32 of each window's extreme: the first NaN, else the first tie.

    An int64 key has the value's bits, ordered like integers, in its upper half and the row
    number counted from the end in its lower half. The maximum of the keys is the extreme and,
    among ties, the earliest row.
    """
    block, values = series.block, series.numbers
    values = values if largest else -values
    if values.dtype == torch.float64:
        return _extreme_rows_float64(series, values, series.windows(family))
    bits = (values + 0.0).view(torch.int32)  # adding 0.0 turns -0 into 0
    bits = bits ^ ((bits >> 31) & _HIGHEST)
    if not series.rows.is_dense or series.rows.num_leading_nans:
        bits = bits.masked_fill_(values.isnan(), _HIGHEST)
        if not block.is_full:
            bits.masked_fill_(~block.is_stored, _LOWEST)
    from_end = block.num_rows - block.rows.to(torch.int64)
    keys = (bits.to(torch.int64) << 32) | from_end
    largest_keys = rolling_extremes(keys, series.windows(family), largest=True)
    return {
        w: block.num_rows - (key & 0xFFFFFFFF).to(torch.float32) for w, key in largest_keys.items()
    }


def _extreme_rows_float64(
    series: Series, values: Tensor, windows: tuple[int, ...]
) -> dict[int, Tensor]:
    """Do the same for float64 values, whose bits leave no room for the row number."""
    block = series.block
    lowest, highest = torch.finfo(torch.float64).min, float("inf")
    values = torch.nan_to_num(values, nan=highest, posinf=highest)
    values = values.masked_fill(~block.is_stored, lowest)
    rows = block.rows.expand_as(values).to(torch.float32).contiguous()
    results = {1: (values, rows)}
    for link in window_chain(windows, overlap=True):
        shift = link.shift
        (new, new_row), (old, old_row) = results[link.newer], results[link.older]
        older = old[:-shift] >= new[shift:]
        best, row = new.clone(), new_row.clone()
        best[shift:] = torch.where(older, old[:-shift], new[shift:])
        row[shift:] = torch.where(older, old_row[:-shift], new_row[shift:])
        results[link.window] = (best, row)
    return {w: results[w][1] for w in windows}


def _rank(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    margin = series.build_once("rank", _rank_margins)[window]
    n = series.rows.count(window)
    rank = (margin + (n + 1).to(margin.dtype)).mul_((0.5 / n).to(margin.dtype))
    return executor.block.mask_outside_span(series.rows.mask_missing(rank.to(step.dtype)))


def _rank_margins(series: Series) -> dict[int, Tensor]:
    """Count the values in each window that are smaller than today's, minus those that are larger.

    With n values, the average rank is (margin + n + 1) / 2. NaN is neither smaller nor larger.
    """
    values, windows = series.numbers, series.windows("rank")
    margins, results = torch.zeros_like(values), {}
    buffer = torch.empty_like(values)
    has_no_nan = series.rows.is_dense and not series.rows.num_leading_nans
    for lag in range(1, max(windows) + 1):
        if lag in windows:
            results[lag] = margins.clone()
        if lag == max(windows):
            break
        signs = torch.sub(values[lag:], values[:-lag], out=buffer[lag:]).sign_()
        margins[lag:] += signs if has_no_nan else signs.nan_to_num_(nan=0.0)
    return results


KERNELS: dict[str, Kernel] = {
    "Max": _extreme_kernel(largest=True),
    "Min": _extreme_kernel(largest=False),
    "IdxMax": _position_kernel(largest=True),
    "IdxMin": _position_kernel(largest=False),
    "Rank": _rank,
}
