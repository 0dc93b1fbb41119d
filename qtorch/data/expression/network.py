"""Merging networks: sorted windows out of shorter sorted windows, by minima and maxima alone.

The sorted window of 10 rows is the sorted last 5 merged with the 5 before them, and so on along
the chain of windows. Batcher's odd-even merge (1968) does it with a fixed list of comparisons, each
of which is one element-wise minimum and maximum over all rows and instruments; what no wanted
order statistic depends on is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.plan import window_chain

Wanted: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""For each window, ascending, the places wanted in its sorted values."""


@dataclass(frozen=True)
class _Instruction:
    """`result` is the minimum or maximum of two registers, or a register less some rows.

    "newer" drops the first `rows` rows of `left`, "older" the last.
    """

    kind: Literal["min", "max", "newer", "older"]
    left: int
    right: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Program:
    """Instructions in order with the register each writes; `outputs[window][place]` registers."""

    instructions: tuple[tuple[int, _Instruction], ...]
    dying: tuple[tuple[int, ...], ...]
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
        """Registers of the sorted union of two sorted lists of registers."""
        if not a or not b:
            return a or b
        if len(a) == len(b) == 1:
            return self.compare(a[0], b[0])
        even, odd = self.merge(a[0::2], b[0::2]), self.merge(a[1::2], b[1::2])
        merged = [even[0]]
        for low, high in zip(odd, even[1:], strict=False):
            merged += self.compare(low, high)
        return merged + even[len(odd) + 1 :] + odd[len(even) - 1 :]


@lru_cache(maxsize=64)
def program(wanted: Wanted) -> Program:
    """The instructions that give the wanted places of the sorted windows."""
    builder = _Builder()
    ordered = {1: [0]}
    for link in window_chain(w for w, _ in wanted):
        newer = [
            builder.add(_Instruction("newer", r, rows=link.older)) for r in ordered[link.newer]
        ]
        older = [
            builder.add(_Instruction("older", r, rows=link.newer)) for r in ordered[link.older]
        ]
        ordered[link.window] = builder.merge(newer, older)
    outputs = {w: {place: ordered[w][place] for place in places} for w, places in wanted}
    return _trimmed(builder.instructions, outputs)


def _trimmed(
    instructions: list[_Instruction | None], outputs: dict[int, dict[int, int]]
) -> Program:
    """The program without what no output needs, and where each register is last read."""
    roots = {r for places in outputs.values() for r in places.values()}
    live, waiting = set[int](), list(roots)
    while waiting:
        register = waiting.pop()
        instruction = instructions[register]
        if register not in live:
            live.add(register)
            if instruction is not None:
                waiting += [instruction.left, instruction.right]
    kept = [(r, i) for r, i in enumerate(instructions) if i is not None and r in live]
    last: dict[int, int] = {}
    for at, (_, i) in enumerate(kept):
        last[i.left] = at
        if i.kind in ("min", "max"):
            last[i.right] = at
    dying: list[list[int]] = [[] for _ in kept]
    for register, at in last.items():
        if register not in roots:
            dying[at].append(register)
    return Program(tuple(kept), tuple(map(tuple, dying)), outputs)


def run(steps: Program, values: Tensor) -> dict[int, dict[int, Tensor]]:
    """The wanted order statistics: `[window][place]` -> `[L - window + 1, n]` for values `[L, n]`.

    Row `i` belongs to the window of rows `i..i + window - 1`. Values hold no NaN; let a missing
    one be infinite, then it sorts last.
    """
    registers = {0: values}
    for (result, i), dying in zip(steps.instructions, steps.dying, strict=True):
        left = registers[i.left]
        if i.kind == "min":
            registers[result] = torch.minimum(left, registers[i.right])
        elif i.kind == "max":
            registers[result] = torch.maximum(left, registers[i.right])
        elif i.kind == "newer":
            registers[result] = left[i.rows :]
        else:
            registers[result] = left[: len(left) - i.rows]
        for register in dying:
            del registers[register]
    return {w: {p: registers[r] for p, r in places.items()} for w, places in steps.outputs.items()}
