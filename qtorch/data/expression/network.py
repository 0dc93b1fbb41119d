"""Merging networks, which compute order statistics of rolling windows with minima and maxima.

The sorted window of 10 rows is the sorted window of the last 5 rows merged with that of the 5 rows
before, and so on along the chain of windows. Batcher's odd-even merge (1968) needs a fixed list of
comparisons, each of which is an element-wise minimum and maximum over all rows and instruments.
Comparisons that no needed order statistic depends on are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.plan import window_chain

WindowPositions: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""The needed positions in the sorted values of each window; windows are ascending."""


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
