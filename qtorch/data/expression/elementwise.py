"""Operators that look at one row: arithmetic, comparison, conditions, Log, Sign, If."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step


def _arithmetic(function: Callable[..., Tensor], *, opens: bool = False) -> Kernel:
    """A kernel of two operands; `opens` where it may give numbers out of NaN (`NaN ** 0`)."""

    def kernel(machine: Machine, step: Step) -> Tensor:
        left, right = machine.operand(step, 0), machine.operand(step, 1)
        if step.dtype == torch.float64:
            left, right = _wide(left), _wide(right)
        into = machine.destination(step)
        result = function(left, right) if into is None else function(left, right, out=into)
        return machine.block.seal(result, head=True) if opens else result

    return kernel


def _wide(value: Tensor | int | float) -> Tensor | int | float:
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def _extreme(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's maximum and minimum for a tensor and a constant too; NaN wins, as in numpy."""

    def apply(left: Tensor | float, right: Tensor | float, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(left, Tensor):
            left, right = right, left
        assert isinstance(left, Tensor), "the parser asks for a series in every call"
        if not isinstance(right, Tensor):
            right = left.new_tensor(right)
        return function(left, right, out=out)

    return apply


def _comparison(function: Callable[..., Tensor], mirrored: Callable[..., Tensor]) -> Kernel:
    def kernel(machine: Machine, step: Step) -> Tensor:
        left, right = machine.operand(step, 0), machine.operand(step, 1)
        if isinstance(left, Tensor):
            return function(left, right)
        return mirrored(right, left)

    return kernel


def _condition(function: Callable[..., Tensor]) -> Kernel:
    def kernel(machine: Machine, step: Step) -> Tensor:
        return function(*(machine.value(step, k) for k in range(len(step.arguments))))

    return kernel


def _field(machine: Machine, step: Step) -> Tensor:
    node = step.node
    assert step.operator == "Field"
    return machine.block.load(node)  # type: ignore[arg-type]  # as asserted


def _log(machine: Machine, step: Step) -> Tensor:
    """The logarithm as numpy rounds it in float32: torch's differs in the last place.

    The difference is 1 in 2**24, which a correlation of nearly equal numbers shows. Away from the
    CPU the float64 logarithm, rounded, is nearest to numpy's.
    """
    values = machine.numbers(step)
    if values.dtype == torch.float64:
        return torch.log(values)
    if values.device.type != "cpu":
        return torch.log(values.to(torch.float64)).to(torch.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.log(values.numpy()))


def _sign(machine: Machine, step: Step) -> Tensor:
    values = machine.numbers(step)
    return torch.sign(values).add_(values * 0)  # torch's sign of NaN is 0


def _if(machine: Machine, step: Step) -> Tensor:
    condition = machine.value(step, 0)
    if condition.dtype != torch.bool:
        condition = condition != 0  # NaN counts as true, as in numpy
    chosen = [torch.as_tensor(machine.operand(step, place)).to(step.dtype) for place in (1, 2)]
    left, right = (value.to(condition.device) for value in chosen)
    return machine.block.seal(torch.where(condition, left, right), head=True)


KERNELS: dict[str, Kernel] = {
    "Field": _field,
    "Add": _arithmetic(torch.add),
    "Sub": _arithmetic(torch.sub),
    "Mul": _arithmetic(torch.mul),
    "Div": _arithmetic(torch.div),
    "Power": _arithmetic(torch.pow, opens=True),
    "Greater": _arithmetic(_extreme(torch.maximum)),
    "Less": _arithmetic(_extreme(torch.minimum)),
    "Gt": _comparison(torch.gt, torch.lt),
    "Ge": _comparison(torch.ge, torch.le),
    "Lt": _comparison(torch.lt, torch.gt),
    "Le": _comparison(torch.le, torch.ge),
    "Eq": _comparison(torch.eq, torch.eq),
    "Ne": _comparison(torch.ne, torch.ne),
    "And": _condition(torch.logical_and),
    "Or": _condition(torch.logical_or),
    "Not": _condition(torch.logical_not),
    "Abs": lambda machine, step: machine.numbers(step).abs(),
    "Sign": _sign,
    "Log": _log,
    "If": _if,
}
