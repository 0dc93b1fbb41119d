"""Execution of a plan on a GPU: alike steps are computed together, and the host never waits.

A GPU is given one operation at a time. Alpha158 has 348 steps, but only a few kinds of them: here
the steps that apply one operator to several columns or windows become one operation on a stack (see
`stacked`). Operators without such a form run step by step, on series that find their missing values
without the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qtorch.data.expression.executor import Executor
from qtorch.data.expression.parser import Number
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Block, Rows, Series
from qtorch.data.expression.stacked import Moments, WindowStack, count_cells, finite_cells
from qtorch.data.transfer import send_to_device

ELEMENTWISE = frozenset(
    [
        *("Add", "Sub", "Mul", "Div", "Power", "Greater", "Less", "Abs", "Sign", "Log", "If"),
        *("Gt", "Ge", "Lt", "Le", "Eq", "Ne", "And", "Or", "Not"),
    ]
)


ARITHMETIC = frozenset(["Add", "Sub", "Mul", "Div"])


class GroupResult(NamedTuple):
    """Values `[G, D, n]`, and for some steps of the plan their place in them."""

    stack: Tensor
    places: dict[int, int]


GroupKernel: TypeAlias = "Callable[[GroupExecutor, Sequence[int]], list[GroupResult]]"


class GroupOperator(NamedTuple):
    """How steps are computed together: those of one `family` share their work.

    `max_window`: longer windows are computed step by step. `is_exact`: float32 and float64 inputs
    must not be mixed, because the result has their dtype.
    """

    family: str
    kernel: GroupKernel
    max_window: int | None = None
    is_exact: bool = False
    allows_float64: bool = True


class GroupExecutor(Executor):
    """Executes a stage in groups of steps whose inputs are ready and which are alike.

    `operators`, set by a subclass, are the rolling operators that compute several steps at once.
    """

    operators: ClassVar[dict[str, GroupOperator]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stacks: dict[int, tuple[Tensor, int]] = {}  # by step: its stack, its place in it
        self._counts: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def run(self, out: Tensor, rows: slice | None = None) -> None:
        pending = list(self.stage.steps)
        while pending:
            ready = self._find_ready(pending)
            for at in ready:
                self._load_inputs(self.plan.steps[at])
            for members in self._split_groups(ready):
                self._run_group(members, out, rows)
            self._counts.clear()
            pending = [at for at in pending if at not in ready]

    def _find_ready(self, pending: list[int]) -> set[int]:
        """Return the steps to run next.

        Rolling operators wait until nothing else is ready: then most of them are, together.
        """
        waiting, steps = set(pending), self.plan.steps
        ready = {at for at in pending if waiting.isdisjoint(steps[at].inputs)}
        return {at for at in ready if not self._is_rolling(steps[at])} or ready

    def _is_rolling(self, step: Step) -> bool:
        operator = self.operators.get(step.operator)
        return operator is not None and operator.family not in ("field", "shift")

    def _split_groups(self, ready: set[int]) -> list[list[int]]:
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for at in sorted(ready):
            groups[self._group_key(at)].append(at)
        return list(groups.values())

    def _group_key(self, at: int) -> Hashable:
        """Return what the steps of a group have in common."""
        step = self.plan.steps[at]
        if step.operator in ELEMENTWISE:
            return step.operator, step.dtype, *self._operand_keys(step)
        if not self._has_group_form(step):
            return at
        operator = self.operators[step.operator]
        if operator.family == "field":
            return operator.family
        if operator.family == "shift":
            return operator.family, step.inputs, step.constants[0] > 0
        is_float64 = operator.is_exact and self._values[step.inputs[0]].dtype == torch.float64
        return operator.family, is_float64, self.group_windows(at)

    def _operand_keys(self, step: Step) -> Iterator[Hashable]:
        """Yield what operands that are combined without a copy have in common.

        They are of one stack, or the same series, or numbers in arithmetic beside such.
        """
        for argument in step.arguments:
            if not isinstance(argument, int):
                yield "number" if step.operator in ARITHMETIC else repr(argument.value)
            elif argument in self._stacks:
                yield "stack", id(self._stacks[argument][0])
            else:
                yield "series", argument

    def _has_group_form(self, step: Step) -> bool:
        operator = self.operators.get(step.operator)
        if operator is None or self.block.num_rows < 2:
            return False
        if operator.family == "field":
            return True
        if operator.family == "shift":
            return 0 < abs(step.constants[0]) < self.block.num_rows
        if self._values[step.inputs[0]].dtype == torch.float64 and not operator.allows_float64:
            return False
        return operator.max_window is None or self.get_window(step) <= operator.max_window

    def group_windows(self, at: int) -> tuple[int, ...]:
        """Return the windows of all steps of the same family on the same series, ascending."""
        step = self.plan.steps[at]
        family, series = self.operators[step.operator].family, step.inputs[0]
        consumers = (self.plan.steps[c] for c in self.plan.steps[series].consumers)
        return tuple(
            sorted(
                {
                    self.get_window(other)
                    for other in consumers
                    if other.operator in self.operators
                    and self.operators[other.operator].family == family
                    and other.inputs[0] == series
                    and self._has_group_form(other)
                }
            )
        )

    def _run_group(self, members: Sequence[int], out: Tensor, rows: slice | None) -> None:
        first = self.plan.steps[members[0]]
        target = None
        if first.operator in ELEMENTWISE:
            members = sorted(members, key=self._operand_places)
            target = self._find_target(members, out) if rows is None else None
            results = [self._compute_elementwise(members, target)]
        elif self._has_group_form(first):
            results = self.operators[first.operator].kernel(self, members)
        else:
            value = self.kernels[first.operator](self, first)
            results = [GroupResult(value[None], {members[0]: 0})]
        for at in members:
            self._release(self.plan.steps[at])
        for stack, places in results:
            if target is not None and stack.data_ptr() == target.data_ptr():
                continue  # the group has written its results itself
            for dtype in {self.plan.steps[at].dtype: None for at in places}:
                part = {at: p for at, p in places.items() if self.plan.steps[at].dtype == dtype}
                has_consumers = any(self.plan.steps[at].consumers for at in part)
                values = stack.to(dtype) if has_consumers else stack
                self._write_outputs(values, part, out, rows)
                self._keep_results(values, part)

    def _find_target(self, members: Sequence[int], out: Tensor) -> Tensor | None:
        """Return the part `[G, D, n]` of `out` that the values of a group are, or None."""
        steps = [self.plan.steps[at] for at in members]
        if any(step.consumers or len(step.outputs) != 1 for step in steps):
            return None
        first = steps[0].outputs[0]
        if [step.outputs[0] for step in steps] != list(range(first, first + len(steps))):
            return None
        return out[:, :, first : first + len(steps)].permute(2, 0, 1)

    def _keep_results(self, stack: Tensor, places: dict[int, int]) -> None:
        for at, place in places.items():
            if self.plan.steps[at].consumers:
                self._keep(at, stack[place])
                if at in self._values and len(stack) > 1:
                    self._stacks[at] = stack, place

    def _release(self, step: Step) -> None:
        super()._release(step)
        for i in step.inputs:
            if i not in self._values:
                self._stacks.pop(i, None)

    def _write_outputs(
        self, stack: Tensor, places: dict[int, int], out: Tensor, rows: slice | None
    ) -> None:
        """Write outputs, by one copy where they follow each other in `out` and in the stack."""
        pairs = sorted((o, p) for at, p in places.items() for o in self.plan.steps[at].outputs)
        for outputs, part in _regular_runs(pairs):
            values = self.block.as_numbers(stack[part])[:, rows or slice(None)]
            out[:, :, outputs].permute(2, 0, 1).copy_(values)

    # -- operands ------------------------------------------------------------------------------

    def _compute_elementwise(self, members: Sequence[int], target: Tensor | None) -> GroupResult:
        """Compute steps of one element-wise operator whose operands are alike, into `target`."""
        steps = [self.plan.steps[at] for at in members]
        operands = _GroupOperands(self, steps, target)
        kernel = self.kernels[steps[0].operator]
        stack = kernel(operands, steps[0])  # type: ignore[arg-type]  # it has what kernels read of Operands
        if stack.dim() == 2:  # a single step
            stack = stack[None]
        return GroupResult(stack, {at: k for k, at in enumerate(members)})

    def _operand_places(self, at: int) -> list[int]:
        inputs = self.plan.steps[at].inputs
        return [self._stacks[i][1] if i in self._stacks else -1 for i in inputs]

    def stack_operands(self, indices: Sequence[int]) -> Tensor:
        """Return the values of steps as `[G, D, n]`, or `[D, n]` if they are all the same step."""
        if len(set(indices)) == 1:
            return self._values[indices[0]]
        stack = self._stacks[indices[0]][0]
        runs = list(_regular_runs([(k, self._stacks[i][1]) for k, i in enumerate(indices)]))
        if len(runs) == 1:
            return stack[runs[0][1]]
        return torch.stack([self._values[i] for i in indices])

    def get_input(self, index: int) -> Tensor:
        """Return the values `[D, n]` of a step: numbers or booleans."""
        return self._values[index]

    def get_step_numbers(self, index: int) -> Tensor:
        """Return the values `[D, n]` of a step as numbers."""
        return self.block.as_numbers(self._values[index])

    def count_values(self, series: Sequence[int], values: Tensor, chain: WindowStack) -> Tensor:
        """Return how many values each window of the chain has, `[W, S, D, n]` float64.

        Groups on the same series and windows share the result; `values [S, D, n]` are theirs.
        """
        key = tuple(series), tuple(chain.windows)
        if key not in self._counts:
            self._counts[key] = count_cells(finite_cells(values), chain)
        return self._counts[key]

    # -- series of operators that run step by step ------------------------------------------------

    def build_series(self, values: Tensor, key: tuple[int, ...]) -> Series:
        return DeviceSeries(
            self.block,
            values,
            lambda *families: self.plan.get_windows(key, *families),
            self.find_rows,
        )

    def find_rows(self, values: Tensor) -> Rows:
        """Return the valid cells of a series; whether they equal those of another is not asked."""
        valid = finite_cells(self.block.as_numbers(values)).to(torch.float32)
        windows = self.block.clip_windows(self.plan.all_windows)
        return DeviceRows(self.block, windows, valid=valid)


def _regular_runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Split pairs `(k, place)` into runs of adjacent k at places of one distance; yield slices."""
    start = 0
    while start < len(pairs):
        (first, place), stop, step = pairs[start], start + 1, 1
        if stop < len(pairs) and pairs[stop][0] == first + 1 and pairs[stop][1] > place:
            step = pairs[stop][1] - place
        while stop < len(pairs) and pairs[stop] == (
            first + stop - start,
            place + step * (stop - start),
        ):
            stop += 1
        count = stop - start
        yield slice(first, first + count), slice(place, place + step * (count - 1) + 1, step)
        start = stop


class _GroupOperands:
    """Gives an element-wise kernel the stacked operands of a group in place of those of a step."""

    def __init__(
        self, executor: GroupExecutor, steps: Sequence[Step], target: Tensor | None
    ) -> None:
        self.block: Block = executor.block
        self._executor, self._steps, self._target = executor, steps, target

    def get_value(self, step: Step, position: int) -> Tensor:
        indices = [each.arguments[position] for each in self._steps]
        return self._executor.stack_operands([i for i in indices if isinstance(i, int)])

    def get_operand(self, step: Step, position: int) -> Tensor | int | float:
        if isinstance(step.arguments[position], int):
            return self.block.as_numbers(self.get_value(step, position))
        arguments = [each.arguments[position] for each in self._steps]
        numbers = [a.value for a in arguments if isinstance(a, Number)]
        if len(set(numbers)) == 1:
            return numbers[0]
        other = next(a for a in step.arguments if isinstance(a, int))
        dtypes = (step.dtype, self._executor.get_step_numbers(other).dtype)
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        constants = torch.tensor(numbers, dtype=dtype)[:, None, None]
        return send_to_device(constants, self.block.device)

    def get_numbers(self, step: Step, position: int = 0) -> Tensor:
        return self.block.as_numbers(self.get_value(step, position))

    def get_output(self, step: Step) -> Tensor | None:
        """Return the part of the results that the group may write to directly, or None."""
        inputs = (self._executor.get_input(i) for each in self._steps for i in each.inputs)
        if self._target is None or any(v.dtype != torch.float32 for v in inputs):
            return None
        return self._target[0] if len(self._steps) == 1 else self._target


class DeviceRows(Rows):
    """The valid cells of a series, without a question that the host would wait for."""

    def mask_empty(self, result: Tensor, window: int) -> Tensor:
        return result.add_(self._empty_mask(window))


class DeviceSeries(Series):
    """A series whose variances need no second pass, in which the host would wait for a count."""

    def variance(self, window: int) -> Tensor:
        if self._moments is None:
            numbers = self.numbers.to(torch.float64)[None]
            rows = self.block.rows.expand_as(numbers)
            self._moments = Moments(numbers, rows, self.windows("square"))
        moments = self._moments
        variance = moments.squares([0]) * moments.inverse_dof([0])
        return variance[moments.chain.position(window), 0]

    _moments: Moments | None = None
