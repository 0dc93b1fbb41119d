"""Rolling operators made of order: extremes, their places, ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step, chain_for
from qtorch.data.expression.series import Series

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def rolling_extremes(
    base: Tensor, windows: tuple[int, ...], function: Callable[..., Tensor]
) -> dict[int, Tensor]:
    """Maximum or minimum over each window, cut at the first row; windows may overlap in two."""
    built = {1: base}
    chain = chain_for(windows, len(base), overlap=True)
    for at, link in enumerate(chain):
        newer, older, cut = built[link.newer], built[link.older], link.shift
        total = torch.empty_like(base)
        function(newer[cut:], older[:-cut], out=total[cut:])
        total[:cut] = newer[:cut]
        built[link.window] = total
        needed = {w for later in chain[at + 1 :] for w in (later.newer, later.older)}
        for spent in [w for w in built if w not in needed and w not in windows]:
            del built[spent]
    return {w: built[w] for w in windows}


def _extreme(*, largest: bool) -> Kernel:
    family = "max" if largest else "min"
    function = torch.maximum if largest else torch.minimum
    nothing = float("-inf") if largest else float("inf")

    def build(series: Series) -> dict[int, Tensor]:
        base = series.numbers
        if not series.complete:
            base = torch.nan_to_num(base, nan=nothing, posinf=nothing, neginf=nothing)
        return rolling_extremes(base, series.windows(family), function)

    def kernel(machine: Machine, step: Step) -> Tensor:
        series = machine.series(step)
        found = series.built(family, build)[series.effective(int(step.numbers[0]))]
        if series.complete:
            return found
        return machine.block.seal(found + found * 0)  # what saw no value is infinite: NaN

    return kernel


def _place(*, largest: bool) -> Kernel:
    family = "argmax" if largest else "argmin"

    def kernel(machine: Machine, step: Step) -> Tensor:
        series, window = machine.series(step), int(step.numbers[0])
        row = series.built(family, lambda s: _rows_of_extreme(s, family, largest))
        place = row[series.effective(window)] - _first_rows(series, window)
        empty = series.empty(window)
        if empty is not None:
            place += empty
        return machine.block.seal(place, head=True)

    return kernel


def _first_rows(series: Series, window: int) -> Tensor:
    """The row before each window's first one, float32."""
    return (series.block.first_row(series.effective(window)) - 1).to(torch.float32)


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
    if not series.complete:
        bits = bits.masked_fill_(values.isnan(), _HIGHEST)
        if not block.whole:
            bits.masked_fill_(~block.inside, _LOWEST)
    from_end = block.num_rows - block.rows.to(torch.int64)
    keys = (bits.to(torch.int64) << 32) | from_end
    built = rolling_extremes(keys, series.windows(family), torch.maximum)
    return {
        w: block.num_rows - (key & 0xFFFFFFFF).to(torch.float32) for w, key in built.items()
    }


def _rows_by_pairs(
    series: Series, values: Tensor, windows: tuple[int, ...]
) -> dict[int, Tensor]:
    """The same for float64 values, whose bits leave no room for the row."""
    block = series.block
    lowest, highest = torch.finfo(torch.float64).min, float("inf")
    values = torch.nan_to_num(values, nan=highest, posinf=highest)
    values = values.masked_fill(~block.inside, lowest)
    rows = block.rows.expand_as(values).to(torch.float32).contiguous()
    built = {1: (values, rows)}
    for link in chain_for(windows, block.num_rows, overlap=True):
        cut = link.shift
        (new, new_row), (old, old_row) = built[link.newer], built[link.older]
        older = old[:-cut] >= new[cut:]
        best, row = new.clone(), new_row.clone()
        best[cut:] = torch.where(older, old[:-cut], new[cut:])
        row[cut:] = torch.where(older, old_row[:-cut], new_row[cut:])
        built[link.window] = (best, row)
    return {w: built[w][1] for w in windows}


def _rank(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), int(step.numbers[0])
    ahead = series.built("rank", _leads)[series.effective(window)]
    n = series.count(window)
    rank = (ahead + (n + 1).to(ahead.dtype)).mul_((0.5 / n).to(ahead.dtype))
    return machine.block.seal(series.reopen(rank.to(step.dtype)))


def _leads(series: Series) -> dict[int, Tensor]:
    """For each window, how many of its values today's exceeds less how many exceed it.

    With n values the average rank is (leads + n + 1) / 2. NaN compares as neither.
    """
    values, windows = series.numbers, series.windows("rank")
    leads, found = torch.zeros_like(values), {}
    buffer = torch.empty_like(values)
    for lag in range(1, max(windows) + 1):
        if lag in windows:
            found[lag] = leads.clone()
        if lag == max(windows):
            break
        ahead = torch.sub(values[lag:], values[:-lag], out=buffer[lag:]).sign_()
        leads[lag:] += ahead if series.complete else ahead.nan_to_num_(nan=0.0)
    return found


KERNELS: dict[str, Kernel] = {
    "Max": _extreme(largest=True),
    "Min": _extreme(largest=False),
    "IdxMax": _place(largest=True),
    "IdxMin": _place(largest=False),
    "Rank": _rank,
}
