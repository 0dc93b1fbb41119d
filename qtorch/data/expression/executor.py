"""Execution of a plan on a block of instruments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Self, TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.parser import Number, Text
from qtorch.data.expression.plan import Key, Plan, Stage, Step
from qtorch.data.expression.series import Block, Pair, Rows, Series, find_valid_cells

Kernel: TypeAlias = "Callable[[Executor, Step], Tensor]"


class Executor:
    """Executes a stage of a plan on a block and holds the values of its steps.

    Kernels read their arguments from the executor. A value and its cached rolling sums are freed
    after the last step that reads them. `stored` holds the values `[D, N]` of earlier stages, and
    receives those of this stage that later ones read.
    """

    def __init__(
        self,
        block: Block,
        plan: Plan,
        kernels: dict[str, Kernel],
        stage: Stage | None = None,
        stored: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.block, self.plan, self.kernels = block, plan, kernels
        self.stage = plan.stages[0] if stage is None else stage
        self._stored = {} if stored is None else stored
        self._values: dict[int, Tensor] = {}
        self._series: dict[int, Series] = {}
        self._pairs: dict[Key, Pair] = {}
        self._rows: list[Rows] = []
        self._target: Tensor | None = None
        self._num_pending_uses = Counter(
            i for at in self.stage.steps for i in set(plan.steps[at].inputs)
        )

    def for_block(self, block: Block, plan: Plan) -> Self:
        """Return an executor of another plan on another block."""
        return type(self)(block, plan, self.kernels)

    def run(self, out: Tensor, rows: slice | None = None) -> None:
        """Compute the steps and write the rows of output `k` (default: all) to `out[:, :, k]`."""
        for at in self.stage.steps:
            step = self.plan.steps[at]
            self._load_inputs(step)
            targets = [out[:, :, output] for output in step.outputs]
            is_final = rows is None and targets and not step.consumers
            self._target = targets[0] if is_final else None
            value = self.kernels[step.operator](self, step)
            for target in targets:
                if target is not value:
                    target.copy_(self.block.as_numbers(value)[rows or slice(None)])
            self._release(step)
            if step.consumers:
                self._keep(at, value if step.is_condition else value.to(step.dtype))

    def _load_inputs(self, step: Step) -> None:
        for i in step.inputs:
            if i not in self._values:
                self._values[i] = self._stored[i][
                    :, self.block.start : self.block.stop
                ].contiguous()

    def _keep(self, at: int, value: Tensor) -> None:
        if at in self.stage.stored:
            self._stored[at][:, self.block.start : self.block.stop] = value
        if self._num_pending_uses[at]:
            self._values[at] = value

    def get_output(self, step: Step) -> Tensor | None:
        """Return the output tensor that a kernel may write to directly, saving a copy, or None."""
        is_float32 = all(self._values[i].dtype == torch.float32 for i in step.inputs)
        return self._target if is_float32 else None

    def _release(self, step: Step) -> None:
        for i in set(step.inputs):
            self._num_pending_uses[i] -= 1
            if self._num_pending_uses[i] == 0:
                del self._values[i]
                self._series.pop(i, None)
                for key in [k for k in self._pairs if i in k]:
                    del self._pairs[key]

    # -- arguments of kernels --------------------------------------------------------------------

    def get_value(self, step: Step, position: int) -> Tensor:
        """Return the stored value `[D, n]` of an argument that is a step: numbers or booleans."""
        argument = step.arguments[position]
        assert isinstance(argument, int), argument
        return self._values[argument]

    def get_operand(self, step: Step, position: int) -> Tensor | int | float:
        """Return an argument as a tensor of numbers or as a constant."""
        argument = step.arguments[position]
        if isinstance(argument, Number):
            return argument.value
        assert not isinstance(argument, Text), argument
        return self.block.as_numbers(self._values[argument])

    def get_numbers(self, step: Step, position: int = 0) -> Tensor:
        """Return an argument that is a step as numbers; conditions become 0 and 1."""
        return self.block.as_numbers(self.get_value(step, position))

    def get_series(self, step: Step, position: int = 0) -> Series:
        """Return the series of an argument, shared by all rolling operators on it."""
        argument = step.arguments[position]
        assert isinstance(argument, int), argument
        if argument not in self._series:
            self._series[argument] = self.build_series(self._values[argument], (argument,))
        return self._series[argument]

    def build_series(self, values: Tensor, key: Key) -> Series:
        """Build the series of a step, whose windows have the given key in the plan."""
        return Series(
            self.block,
            values,
            lambda *families: self.plan.get_windows(key, *families),
            self.find_rows,
        )

    def get_pair(self, step: Step) -> Pair:
        """Return the pair of the first two arguments."""
        key = step.inputs
        if key not in self._pairs:
            self._pairs[key] = Pair(
                self.get_series(step, 0),
                self.get_series(step, 1),
                lambda: self.plan.get_windows(key),
                self.find_rows,
            )
        return self._pairs[key]

    def find_rows(self, values: Tensor) -> Rows:
        """Return the valid cells of `values`; series with the same valid cells share the object."""
        num_leading_nans, valid = find_valid_cells(self.block, values)
        for rows in self._rows:
            if rows.matches(num_leading_nans, valid):
                return rows
        windows = self.block.clip_windows(self.plan.all_windows)
        self._rows.append(Rows(self.block, windows, num_leading_nans=num_leading_nans, valid=valid))
        return self._rows[-1]

    def get_window(self, step: Step) -> int:
        """Return the window of the step, limited to the calendar; 0 means all past rows."""
        return self.block.clip_window(int(step.constants[0]))
