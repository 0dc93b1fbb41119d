"""Rolling quantiles and medians, interpolated linearly."""

from __future__ import annotations

import bisect
from math import floor

import numpy as np
import torch
from torch import Tensor

from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.network import program, run
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series

_LONGEST = 256  # longer windows make networks of many thousand steps
_FEW = 0.04  # the share of cut windows up to which sorting them one by one is quicker
_INFINITE = float("inf")

Shares = dict[int, tuple[float, ...]]
Found = dict[tuple[int, float], Tensor]


def _quantile(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    share = float(step.numbers[1]) if step.operator == "Quantile" else 0.5
    found = series.quantiles
    if found is None:
        asked: dict[int, set[float]] = {}
        for (key, w), shares in machine.plan.shares.items():
            if key == step.inputs:
                asked.setdefault(machine.block.window(w), set()).update(shares)
        found = series.quantiles = _quantiles(series, {w: tuple(s) for w, s in asked.items()})
    return machine.block.seal(found[window, share].to(step.dtype, copy=True))


def _quantiles(series: Series, asked: Shares) -> Found:
    """Every quantile asked of a series, by window and share; `[D, n]`, float64 where it matters."""
    long = {w: shares for w, shares in asked.items() if w > _LONGEST}
    short = {w: shares for w, shares in asked.items() if w <= _LONGEST}
    found = _by_insertion(series, long) if long else {}
    if short:
        cut = max(_cut_cells(series, w).mean(dtype=torch.float32).item() for w in short)
        found |= _few_cut(series, short) if cut <= _FEW else _many_cut(series, short)
    return found


def _cut_cells(series: Series, window: int) -> Tensor:
    """`[D, n]` bool: windows that hold some values, but fewer than the window."""
    n = series.rows.count(window)
    block = series.block
    return ((n < window) & (n > 0)).expand(block.num_rows, block.num_columns)


def _padded(series: Series, window: int) -> Tensor:
    """Values with `window - 1` rows before; missing ones and the rows before are infinite."""
    values = series.numbers
    if not series.rows.solid or series.rows.lead:
        values = torch.nan_to_num(values, nan=_INFINITE)
    return torch.cat([values.new_full((window - 1, values.shape[1]), _INFINITE), values])


# -- nearly all windows are full: the place of a quantile is known ---------------------------------


def _few_cut(series: Series, asked: Shares) -> Found:
    wanted = []
    for w in sorted(asked):
        places = {k for s in asked[w] for k in _places(s, w)}
        wanted.append((w, tuple(sorted(places))))
    longest = max(asked)
    padded = _padded(series, longest)
    ordered = run(program(tuple(wanted)), padded)
    found: Found = {}
    for w, shares in asked.items():
        cells = _cut_cells(series, w).nonzero(as_tuple=True)
        sorted_cells = _sorted_cells(padded, cells, w, longest)
        n = series.rows.count(w).expand(series.values.shape)[cells]
        rows = slice(longest - w, None)
        for share in shares:
            low, *high = (ordered[w][k][rows] for k in _places(share, w))
            part = share * (w - 1) - floor(share * (w - 1))
            value = torch.lerp(low, high[0], part) if high else low.clone()
            value[cells] = _pick(sorted_cells, n, share).to(value.dtype)
            found[w, share] = series.rows.void(value, w)
    return found


def _places(share: float, n: int) -> tuple[int, ...]:
    """The place or the two places between which the quantile of n values lies."""
    exact = share * (n - 1)
    low = floor(exact)
    return (low,) if low == exact else (low, low + 1)


def _sorted_cells(padded: Tensor, cells: tuple[Tensor, ...], window: int, longest: int) -> Tensor:
    """The sorted windows `[M, window]` of some cells."""
    rows, columns = cells
    steps = torch.arange(longest - window, longest, device=padded.device)
    return padded[rows[:, None] + steps, columns[:, None]].sort(-1).values


def _pick(ordered: Tensor, n: Tensor, share: float) -> Tensor:
    """The quantile of the first `n` of each row, float64."""
    place = share * (n - 1)
    low = place.floor()
    part, low = place - low, low.to(torch.int64)
    high = (low + 1).clamp(max=ordered.shape[1] - 1)
    below = ordered.gather(1, low[:, None])[:, 0].to(torch.float64)
    above = ordered.gather(1, high[:, None])[:, 0].to(torch.float64)
    return torch.where(part > 0, below + (above - below) * part, below)


# -- many windows are cut: the place changes from cell to cell -------------------------------------


def _many_cut(series: Series, asked: Shares) -> Found:
    longest = max(asked)
    wanted = []
    for w in sorted(asked):
        highest = max(_places(max(asked[w]), w))
        wanted.append((w, tuple(range(highest + 1))))
    ordered = run(program(tuple(wanted)), _padded(series, longest))
    found: Found = {}
    for w, shares in asked.items():
        n = series.rows.count(w).expand(series.values.shape)
        stack = torch.stack([ordered[w].pop(k)[longest - w :] for k in sorted(ordered[w])])
        for share in shares:
            place = share * (n - 1).clamp(min=0)
            low = place.floor()
            part, low = place - low, low.to(torch.int64)
            high = (low + (part > 0)).clamp(max=len(stack) - 1)
            below = stack.gather(0, low[None])[0].to(torch.float64)
            above = stack.gather(0, high[None])[0].to(torch.float64)
            # An empty window is all infinite, and inf - inf is NaN.
            found[w, share] = below + (above - below) * part
    return found


# -- long windows ----------------------------------------------------------------------------------


def _by_insertion(series: Series, asked: Shares) -> Found:
    """One sorted list an instrument, on the CPU: a value in, a value out, row by row."""
    values = series.numbers.to(torch.float64).cpu().numpy()
    out = {(w, s): np.full(values.shape, np.nan) for w, shares in asked.items() for s in shares}
    for window, shares in asked.items():
        for column in range(values.shape[1]):
            ordered: list[float] = []
            numbers = values[:, column].tolist()
            results = [out[window, s][:, column] for s in shares]
            for row, value in enumerate(numbers):
                if value == value:
                    bisect.insort(ordered, value)
                old = numbers[row - window] if row >= window else float("nan")
                if old == old:
                    del ordered[bisect.bisect_left(ordered, old)]
                if ordered:
                    for share, result in zip(shares, results, strict=True):
                        low, *high = (ordered[k] for k in _places(share, len(ordered)))
                        part = share * (len(ordered) - 1) % 1
                        result[row] = low + (high[0] - low) * part if high else low
    device = series.values.device
    return {key: torch.from_numpy(found).to(device) for key, found in out.items()}


KERNELS: dict[str, Kernel] = {"Quantile": _quantile, "Med": _quantile}
