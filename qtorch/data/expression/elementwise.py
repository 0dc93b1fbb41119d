"""Operators on single rows: arithmetic, comparisons, conditions, Log, Sign, If."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.parser import Field
from qtorch.data.expression.plan import Step


def _arithmetic(function: Callable[..., Tensor], *, fills_nan: bool = False) -> Kernel:
    """Build a kernel of two operands; `fills_nan` if NaN may become a number (`NaN ** 0`)."""

    def kernel(executor: Executor, step: Step) -> Tensor:
        left, right = executor.get_operand(step, 0), executor.get_operand(step, 1)
        if step.dtype == torch.float64:
            left, right = _to_float64(left), _to_float64(right)
        out = executor.get_output(step)
        result = function(left, right) if out is None else function(left, right, out=out)
        return executor.block.mask_outside_span(result, head=True) if fills_nan else result

    return kernel


def _to_float64(value: Tensor | int | float) -> Tensor | int | float:
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def _accept_constants(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend torch.maximum or minimum to constant operands; NaN propagates, as in numpy."""

    def apply(left: Tensor | float, right: Tensor | float, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(left, Tensor):
            left, right = right, left
        assert isinstance(left, Tensor), "the parser requires a series in every call"
        if not isinstance(right, Tensor):
            right = left.new_full((), right)  # a GPU would wait for `new_tensor`
        return function(left, right, out=out)

    return apply


def _comparison(function: Callable[..., Tensor], mirror: Callable[..., Tensor]) -> Kernel:
    def kernel(executor: Executor, step: Step) -> Tensor:
        left, right = executor.get_operand(step, 0), executor.get_operand(step, 1)
        if isinstance(left, Tensor):
            return function(left, right)
        return mirror(right, left)

    return kernel


def _condition(function: Callable[..., Tensor]) -> Kernel:
    def kernel(executor: Executor, step: Step) -> Tensor:
        return function(*(executor.get_value(step, k) for k in range(len(step.arguments))))

    return kernel


def _field(executor: Executor, step: Step) -> Tensor:
    assert isinstance(step.node, Field)
    return executor.block.load(step.node)


def _log(executor: Executor, step: Step) -> Tensor:
    """Compute the logarithm with numpy's rounding in float32, which differs from torch's.

    The relative difference is 2**-24, which becomes visible in the correlation of nearly equal
    numbers. On a GPU, the rounded float64 logarithm is closest to numpy's result.
    """
    values = executor.get_numbers(step)
    if values.dtype == torch.float64:
        return torch.log(values)
    if values.device.type != "cpu":
        return torch.log(values.to(torch.float64)).to(torch.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.log(values.numpy()))


def _sign(executor: Executor, step: Step) -> Tensor:
    values = executor.get_numbers(step)
    return torch.sign(values).add_(values * 0)  # torch's sign of NaN is 0, but must be NaN


def _if_else(executor: Executor, step: Step) -> Tensor:
    condition = executor.get_value(step, 0)
    if condition.dtype != torch.bool:
        condition = condition != 0  # NaN is true, as in numpy
    operands = (executor.get_operand(step, position) for position in (1, 2))
    left, right = (
        each.to(step.dtype)
        if isinstance(each, Tensor)
        else condition.new_full((), each, dtype=step.dtype)
        for each in operands
    )
    return executor.block.mask_outside_span(torch.where(condition, left, right), head=True)


KERNELS: dict[str, Kernel] = {
    "Field": _field,
    "Add": _arithmetic(torch.add),
    "Sub": _arithmetic(torch.sub),
    "Mul": _arithmetic(torch.mul),
    "Div": _arithmetic(torch.div),
    "Power": _arithmetic(torch.pow, fills_nan=True),
    "Greater": _arithmetic(_accept_constants(torch.maximum)),
    "Less": _arithmetic(_accept_constants(torch.minimum)),
    "Gt": _comparison(torch.gt, torch.lt),
    "Ge": _comparison(torch.ge, torch.le),
    "Lt": _comparison(torch.lt, torch.gt),
    "Le": _comparison(torch.le, torch.ge),
    "Eq": _comparison(torch.eq, torch.eq),
    "Ne": _comparison(torch.ne, torch.ne),
    "And": _condition(torch.logical_and),
    "Or": _condition(torch.logical_or),
    "Not": _condition(torch.logical_not),
    "Abs": lambda executor, step: executor.get_numbers(step).abs(),
    "Sign": _sign,
    "Log": _log,
    "If": _if_else,
}
