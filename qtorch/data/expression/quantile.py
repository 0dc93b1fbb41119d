"""Rolling quantiles and medians with linear interpolation."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series, window_chain

_MAX_NETWORK_WINDOW = 256  # merging networks of longer windows have many thousand steps
_MAX_PARTIAL = 0.04  # fraction of partial windows up to which sorting each of them is faster
_INFINITE = float("inf")

WindowPositions: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""The needed positions in the sorted values of each window; windows are ascending."""
Levels: TypeAlias = dict[int, tuple[float, ...]]
Quantiles: TypeAlias = dict[tuple[int, float], Tensor]

# -- merging networks: programs of minima and maxima that sort all windows -----------------------


@dataclass(frozen=True)
class _Instruction:
    """An instruction: the minimum or maximum of two registers, or a part of a register.

    "newer" drops the first `rows` rows of `left`, "older" drops the last.
    """

    kind: Literal["min", "max", "newer", "older"]
    left: int
    right: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Program:
    """Instructions with their result registers, and the output registers by window and position."""

    instructions: tuple[tuple[int, _Instruction], ...]
    freed_registers: tuple[tuple[int, ...], ...]
    outputs: dict[int, dict[int, int]]


class _Builder:
    def __init__(self) -> None:
        self.instructions: list[_Instruction | None] = [None]  # register 0 is the values

    def add(self, instruction: _Instruction) -> int:
        self.instructions.append(instruction)
        return len(self.instructions) - 1

    def compare(self, a: int, b: int) -> list[int]:
        return [self.add(_Instruction("min", a, b)), self.add(_Instruction("max", a, b))]

    def merge(self, a: list[int], b: list[int]) -> list[int]:
        """Merge two sorted lists of registers and return the sorted registers."""
        if not a or not b:
            return a or b
        if len(a) == len(b) == 1:
            return self.compare(a[0], b[0])
        even, odd = self.merge(a[0::2], b[0::2]), self.merge(a[1::2], b[1::2])
        result = [even[0]]
        for low, high in zip(odd, even[1:], strict=False):
            result += self.compare(low, high)
        return result + even[len(odd) + 1 :] + odd[len(even) - 1 :]


@lru_cache(maxsize=64)
def build_program(window_positions: WindowPositions) -> Program:
    """Build the program that computes the given positions of the sorted windows."""
    builder = _Builder()
    sorted_windows = {1: [0]}
    for link in window_chain(w for w, _ in window_positions):
        newer = [
            builder.add(_Instruction("newer", r, rows=link.older))
            for r in sorted_windows[link.newer]
        ]
        older = [
            builder.add(_Instruction("older", r, rows=link.newer))
            for r in sorted_windows[link.older]
        ]
        sorted_windows[link.window] = builder.merge(newer, older)
    outputs = {
        w: {position: sorted_windows[w][position] for position in positions}
        for w, positions in window_positions
    }
    return _trim_program(builder.instructions, outputs)


def _trim_program(
    instructions: list[_Instruction | None], outputs: dict[int, dict[int, int]]
) -> Program:
    """Remove unneeded instructions, and find the last use of each register."""
    roots = {r for positions in outputs.values() for r in positions.values()}
    needed_registers, pending = set[int](), list(roots)
    while pending:
        register = pending.pop()
        instruction = instructions[register]
        if register not in needed_registers:
            needed_registers.add(register)
            if instruction is not None:
                pending += [instruction.left, instruction.right]
    kept_instructions = [
        (r, i) for r, i in enumerate(instructions) if i is not None and r in needed_registers
    ]
    last: dict[int, int] = {}
    for index, (_, i) in enumerate(kept_instructions):
        last[i.left] = index
        if i.kind in ("min", "max"):
            last[i.right] = index
    freed_registers: list[list[int]] = [[] for _ in kept_instructions]
    for register, index in last.items():
        if register not in roots:
            freed_registers[index].append(register)
    return Program(tuple(kept_instructions), tuple(map(tuple, freed_registers)), outputs)


def run_program(program: Program, values: Tensor) -> dict[int, dict[int, Tensor]]:
    """Run a program on values `[L, n]`; `result[window][position]` is `[L - window + 1, n]`.

    Row `i` of a result belongs to the window of rows `i..i + window - 1`. The values must not
    have NaN; set missing values to infinity, so that they sort last.
    """
    registers = {0: values}
    for (result, i), last_uses in zip(program.instructions, program.freed_registers, strict=True):
        left = registers[i.left]
        if i.kind == "min":
            registers[result] = torch.minimum(left, registers[i.right])
        elif i.kind == "max":
            registers[result] = torch.maximum(left, registers[i.right])
        elif i.kind == "newer":
            registers[result] = left[i.rows :]
        else:
            registers[result] = left[: len(left) - i.rows]
        for register in last_uses:
            del registers[register]
    return {
        w: {position: registers[r] for position, r in positions.items()}
        for w, positions in program.outputs.items()
    }


# -- the operators ---------------------------------------------------------------------------------


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
    items = levels_by_window.items()
    long_windows = {w: levels for w, levels in items if w > _MAX_NETWORK_WINDOW}
    short_windows = {w: levels for w, levels in items if w <= _MAX_NETWORK_WINDOW}
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
    if series.rows.has_missing:
        values = torch.nan_to_num(values, nan=_INFINITE)
    return torch.cat([values.new_full((window - 1, values.shape[1]), _INFINITE), values])


# -- nearly all windows are full, so that quantiles have fixed positions ---------------------------


def _full_window_quantiles(series: Series, levels_by_window: Levels) -> Quantiles:
    window_positions = tuple(
        (w, tuple(sorted({k for s in levels for k in _quantile_positions(s, w)})))
        for w, levels in sorted(levels_by_window.items())
    )
    longest = max(levels_by_window)
    padded_values = _pad_values(series, longest)
    sorted_windows = run_program(build_program(window_positions), padded_values)
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
    window_positions = tuple(
        (w, tuple(range(max(_quantile_positions(max(levels), w)) + 1)))
        for w, levels in sorted(levels_by_window.items())
    )
    sorted_windows = run_program(build_program(window_positions), _pad_values(series, longest))
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
