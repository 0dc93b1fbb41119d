"""Operators that look at other rows one by one or at all of them: Ref, Delta, EMA, Mad, Mask."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.block import NAN, Block
from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step


def _shifted(block: Block, values: Tensor, lag: int) -> Tensor:
    """Values `lag` rows ago (ahead if negative); 0: each instrument's first stored row."""
    rows = block.num_rows
    if lag == 0:
        first = values.gather(0, block.first.clamp(max=max(rows - 1, 0))[None])
        return block.seal(first.expand_as(values).clone(), head=True)
    shifted = torch.empty_like(values)
    if lag > 0:
        cut = min(lag, rows)
        shifted[:cut] = NAN
        shifted[cut:] = values[: rows - cut]
        return block.seal(shifted)
    cut = min(-lag, rows)
    shifted[rows - cut :] = NAN
    shifted[: rows - cut] = values[cut:]
    return block.seal(shifted, head=True)


def _ref(machine: Machine, step: Step) -> Tensor:
    return _shifted(machine.block, machine.numbers(step), int(step.numbers[0]))


def _delta(machine: Machine, step: Step) -> Tensor:
    values = machine.numbers(step)
    return values - _shifted(machine.block, values, int(step.numbers[0]))


# -- exponential means -----------------------------------------------------------------------------


def _exponential_mean(machine: Machine, step: Step) -> Tensor:
    """pandas' adjusted exponential mean over all history; a missing day only ages the weights."""
    series, given = machine.series(step), step.numbers[0]
    block = machine.block
    if given == 0:
        mean = _expanding_exponential(machine, step)
    else:
        alpha = given if 0 < given < 1 else 2 / (given + 1)
        total = _decayed(series.filled.to(torch.float64), 1 - alpha)
        weight = _decayed(series.rows.valid.to(torch.float64), 1 - alpha)
        mean = _held(total / weight, series.rows.valid)
    return block.seal(mean.to(step.dtype))


def _decayed(base: Tensor, keep: float) -> Tensor:
    """`y[t] = base[t] + keep * y[t - 1]`, by doubling: after k passes y sees 2**k rows."""
    total, shift, factor = base, 1, keep
    while shift < len(base) and factor > 0:
        longer = total.clone()
        longer[shift:].add_(total[:-shift], alpha=factor)
        total, shift, factor = longer, shift * 2, factor * factor
    return total


def _held(values: Tensor, valid: Tensor) -> Tensor:
    """Each row's value, or the latest valid row's before it (NaN before the first)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    latest = torch.where(valid > 0, rows, -1).cummax(0).values
    return values.gather(0, latest.clamp(min=0)).masked_fill_(latest < 0, NAN)


def _expanding_exponential(machine: Machine, step: Step) -> Tensor:
    """EMA with window 0: row L of an instrument has weights `(1 - 2/(1 + L)) ** lag`.

    The weights change with the row, so this is a product of a `[D, D]` matrix with the series,
    each instrument moved up to its first stored row.
    """
    series, block = machine.series(step), machine.block
    rows = torch.arange(block.num_rows, device=block.device)
    source = rows[:, None] + block.first
    beyond = source >= block.num_rows
    moved = series.filled.to(torch.float64).gather(0, source.clamp(max=block.num_rows - 1))
    lag = (rows[:, None] - rows).to(torch.float64)
    keep = (1 - 2 / (2 + rows.to(torch.float64)))[:, None]
    weights = torch.where(lag >= 0, keep ** lag.clamp(min=0), 0.0)
    weights /= weights.sum(1, keepdim=True)
    mean = weights @ moved.masked_fill_(beyond, 0.0)
    back = (rows[:, None] - block.first).clamp(min=0)
    # pandas asks for one value in the window, however old.
    seen = series.rows.valid.cumsum(0) > 0
    return mean.gather(0, back).masked_fill_(~seen, NAN)


# -- mean absolute deviation -----------------------------------------------------------------------


def _mean_absolute_deviation(machine: Machine, step: Step) -> Tensor:
    series = machine.series(step)
    window, rows = machine.window(step), series.rows
    mean = series.sum("sum", window).to(torch.float64) * rows.per_count(window)
    total = torch.zeros_like(mean)
    for lag in range(window):
        distance = (series.filled[: len(mean) - lag] - mean[lag:]).abs_()
        distance *= rows.valid[: len(mean) - lag]
        total[lag:] += distance
    return machine.block.seal(total.mul_(rows.per_count(window)).to(step.dtype))


KERNELS: dict[str, Kernel] = {
    "Ref": _ref,
    "Delta": _delta,
    "EMA": _exponential_mean,
    "Mad": _mean_absolute_deviation,
}
