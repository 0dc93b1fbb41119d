"""Rolling operators made of order: extremes, their places, ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.chain import rolling_extremes
from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step, window_chain
from qtorch.data.expression.series import Series

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def _extreme(*, largest: bool) -> Kernel:
    family = "max" if largest else "min"
    nothing = float("-inf") if largest else float("inf")

    def build(series: Series) -> dict[int, Tensor]:
        base = series.numbers
        if not series.rows.solid or series.rows.lead:
            base = torch.nan_to_num(base, nan=nothing)
        return rolling_extremes(base, series.windows(family), largest=largest)

    def kernel(machine: Machine, step: Step) -> Tensor:
        series, window = machine.series(step), machine.window(step)
        found = series.built(family, build)[window]
        return machine.block.seal(series.rows.void(found.clone(), window))

    return kernel


def _place(*, largest: bool) -> Kernel:
    family = "argmax" if largest else "argmin"

    def kernel(machine: Machine, step: Step) -> Tensor:
        series, window = machine.series(step), machine.window(step)
        row = series.built(family, lambda s: _rows_of_extreme(s, family, largest))[window]
        place = row - (machine.block.first_row(window) - 1).to(torch.float32)
        return machine.block.seal(series.rows.void(place, window), head=True)

    return kernel


def _rows_of_extreme(series: Series, family: str, largest: bool) -> dict[int, Tensor]:
    """The row `[D, n]` float32 of the extreme of each window: the first NaN, else the first tie.

    The value's bits, in an order that integers keep, stand above the row counted from the end:
    one int64 maximum finds the extreme and, among equals, the earliest row.
    """
    block, values = series.block, series.numbers
    values = values if largest else -values
    if values.dtype == torch.float64:
        return _rows_by_pairs(series, values, series.windows(family))
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0 equals 0
    bits = bits ^ ((bits >> 31) & _HIGHEST)
    if not series.rows.solid or series.rows.lead:
        bits = bits.masked_fill_(values.isnan(), _HIGHEST)
        if not block.whole:
            bits.masked_fill_(~block.inside, _LOWEST)
    from_end = block.num_rows - block.rows.to(torch.int64)
    keys = (bits.to(torch.int64) << 32) | from_end
    built = rolling_extremes(keys, series.windows(family), largest=True)
    return {w: block.num_rows - (key & 0xFFFFFFFF).to(torch.float32) for w, key in built.items()}


def _rows_by_pairs(series: Series, values: Tensor, windows: tuple[int, ...]) -> dict[int, Tensor]:
    """The same for float64 values, whose bits leave no room for the row."""
    block = series.block
    lowest, highest = torch.finfo(torch.float64).min, float("inf")
    values = torch.nan_to_num(values, nan=highest, posinf=highest)
    values = values.masked_fill(~block.inside, lowest)
    rows = block.rows.expand_as(values).to(torch.float32).contiguous()
    built = {1: (values, rows)}
    for link in window_chain(windows, overlap=True):
        cut = link.shift
        (new, new_row), (old, old_row) = built[link.newer], built[link.older]
        older = old[:-cut] >= new[cut:]
        best, row = new.clone(), new_row.clone()
        best[cut:] = torch.where(older, old[:-cut], new[cut:])
        row[cut:] = torch.where(older, old_row[:-cut], new_row[cut:])
        built[link.window] = (best, row)
    return {w: built[w][1] for w in windows}


def _rank(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    ahead = series.built("rank", _leads)[window]
    n = series.rows.count(window)
    rank = (ahead + (n + 1).to(ahead.dtype)).mul_((0.5 / n).to(ahead.dtype))
    return machine.block.seal(series.rows.reopen(rank.to(step.dtype)))


def _leads(series: Series) -> dict[int, Tensor]:
    """For each window, how many of its values today's exceeds less how many exceed it.

    With n values the average rank is (leads + n + 1) / 2. NaN compares as neither.
    """
    values, windows = series.numbers, series.windows("rank")
    leads, found = torch.zeros_like(values), {}
    buffer = torch.empty_like(values)
    clean = series.rows.solid and not series.rows.lead
    for lag in range(1, max(windows) + 1):
        if lag in windows:
            found[lag] = leads.clone()
        if lag == max(windows):
            break
        ahead = torch.sub(values[lag:], values[:-lag], out=buffer[lag:]).sign_()
        leads[lag:] += ahead if clean else ahead.nan_to_num_(nan=0.0)
    return found


KERNELS: dict[str, Kernel] = {
    "Max": _extreme(largest=True),
    "Min": _extreme(largest=False),
    "IdxMax": _place(largest=True),
    "IdxMin": _place(largest=False),
    "Rank": _rank,
}
