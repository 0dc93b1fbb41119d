"""A plan run over one block of instruments: each step once, freed after its last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.block import Block
from qtorch.data.expression.node import Number, Text
from qtorch.data.expression.plan import Key, Plan, Step
from qtorch.data.expression.rows import Rows, find_rows
from qtorch.data.expression.series import Pair, Series

Kernel: TypeAlias = "Callable[[Machine, Step], Tensor]"


class Machine:
    """Values of the steps computed so far for a block, and the series and pairs over them.

    Kernels read their arguments here. A value, and whatever rolling sums hang on it, is dropped
    when the last step that reads it is done.
    """

    def __init__(self, block: Block, plan: Plan, kernels: dict[str, Kernel]) -> None:
        self.block, self.plan, self.kernels = block, plan, kernels
        self._values: dict[int, Tensor] = {}
        self._series: dict[int, Series] = {}
        self._pairs: dict[Key, Pair] = {}
        self._rows: list[Rows] = []
        self._target: Tensor | None = None
        self._left = [len(step.consumers) for step in plan.steps]

    def run(self, out: Callable[[int], Tensor]) -> None:
        """Compute all steps; output `k` is written into `out(k)` `[D, n]`."""
        for at, step in enumerate(self.plan.steps):
            targets = [out(output) for output in step.outputs]
            self._target = targets[0] if targets and not step.consumers else None
            value = self.kernels[step.operator](self, step)
            for target in targets:
                if target is not value:
                    self._write(target, value)
            self._release(step)
            if step.consumers:
                self._values[at] = value if step.condition else value.to(step.dtype)

    def destination(self, step: Step) -> Tensor | None:
        """Where a kernel may write a result that is an output and nothing else, saving a copy."""
        narrow = all(self._values[i].dtype == torch.float32 for i in step.inputs)
        return self._target if narrow else None

    def _write(self, target: Tensor, value: Tensor) -> None:
        if value.dtype == torch.bool:
            value = self.block.numbers(value)
        target.copy_(value)

    def _release(self, step: Step) -> None:
        for i in set(step.inputs):
            self._left[i] -= 1
            if self._left[i] == 0:
                del self._values[i]
                self._series.pop(i, None)
                for key in [k for k in self._pairs if i in k]:
                    del self._pairs[key]

    # -- what kernels read -----------------------------------------------------------------------

    def value(self, step: Step, place: int) -> Tensor:
        """An argument that is a step, as stored: numbers or true and false, `[D, n]`."""
        argument = step.arguments[place]
        assert isinstance(argument, int), argument
        return self._values[argument]

    def operand(self, step: Step, place: int) -> Tensor | int | float:
        """An argument as a tensor of numbers or as a constant."""
        argument = step.arguments[place]
        if isinstance(argument, Number):
            return argument.value
        assert not isinstance(argument, Text), argument
        return self.block.numbers(self._values[argument])

    def numbers(self, step: Step, place: int = 0) -> Tensor:
        """An argument that is a step as numbers: 0 and 1 for a condition."""
        return self.block.numbers(self.value(step, place))

    def series(self, step: Step, place: int = 0) -> Series:
        """The series over an argument; shared by all rolling operators that look at it."""
        argument = step.arguments[place]
        assert isinstance(argument, int), argument
        if argument not in self._series:
            key = (argument,)
            self._series[argument] = Series(
                self.block,
                self._values[argument],
                lambda *families: self.plan.windows_of(key, *families),
                self.rows_of,
            )
        return self._series[argument]

    def pair(self, step: Step) -> Pair:
        """The pair of the first two arguments."""
        key = step.inputs
        if key not in self._pairs:
            self._pairs[key] = Pair(
                self.series(step, 0),
                self.series(step, 1),
                lambda: self.plan.windows_of(key),
                self.rows_of,
            )
        return self._pairs[key]

    def rows_of(self, values: Tensor) -> Rows:
        """Where there are values; the same object for all series with values in the same cells."""
        windows = self.block.windows(self.plan.all_windows)
        return find_rows(self._rows, self.block, windows, values)

    def window(self, step: Step) -> int:
        """The step's window, cut to the calendar; 0 (all rows so far) is the whole calendar."""
        return self.block.window(int(step.numbers[0]))
