"""Operators that compare the instruments of a day: CSRank, CSZScore, CSScale, CSDemean.

They are functions of `values [D, N]`, the cells `used [D, N]` that take part, and `groups [D, N]`
or None: with groups, a value is compared with those of the same group on the same day. Results
are float64; cells that take no part are undefined. A result at date t depends on the members of t
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from qtorch.core.errors import ExpressionError
from qtorch.data.expression.operators import Operator, get_operators
from qtorch.data.expression.parser import Field, Number, Text
from qtorch.data.expression.plan import Plan, Step
from qtorch.data.expression.series import Block
from qtorch.data.panel.day_order import average_ranks, run_bounds, sort_days
from qtorch.data.threads import map_threads

DayKernel: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_CELLS, _DEVICE_CELLS = 2**17, 2**25  # cells that a thread, or a GPU, computes at once
# A sum of squared deviations below this multiple of the sum of squares is a rounding error.
_ROUNDING = 1e-28


def _rank(values: Tensor, used: Tensor, groups: Tensor | None) -> Tensor:
    # Unused cells sort last. They are not NaN, because numpy sorts arrays with NaN much slower.
    values = values.clamp(max=torch.finfo(values.dtype).max).masked_fill_(~used, torch.inf)
    sorted_values, order = sort_days(values)
    if groups is None:
        ranks = average_ranks(sorted_values)
        count = used.sum(1, keepdim=True)
        return _unsort(ranks.to(torch.float64), order).div_(count)
    by_group = groups.gather(1, order).argsort(dim=1, stable=True)
    order, sorted_values = order.gather(1, by_group), sorted_values.gather(1, by_group)
    sorted_groups = groups.gather(1, order)
    is_new_group = sorted_groups[:, 1:] != sorted_groups[:, :-1]
    is_tied = (sorted_values[:, 1:] == sorted_values[:, :-1]) & ~is_new_group
    (first, last), (group_first, group_last) = run_bounds(~is_tied), run_bounds(is_new_group)
    ranks = (first + last).double().div_(2).sub_(group_first).add_(1)
    return _unsort(ranks / (group_last - group_first + 1), order)


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(values).scatter_(1, order, values)


def _zscore(values: Tensor, used: Tensor, groups: Tensor | None) -> Tensor:
    sums = _GroupSums(used, groups)
    count = sums.compute_totals(torch.ones_like(values))
    deviations = values - sums.compute_totals(values) / count
    squares = sums.compute_totals(deviations.square())
    is_flat = squares <= sums.compute_totals(values.square()) * _ROUNDING
    deviation = (squares / (count - 1)).sqrt_()
    return deviations / deviation.masked_fill_(is_flat | (count < 2), torch.nan)


def _scale(values: Tensor, used: Tensor, groups: Tensor | None) -> Tensor:
    return values / _GroupSums(used, groups).compute_totals(values.abs())


def _demean(values: Tensor, used: Tensor, groups: Tensor | None) -> Tensor:
    sums = _GroupSums(used, groups)
    return values - sums.compute_totals(values) / sums.compute_totals(torch.ones_like(values))


class _GroupSums:
    """Sums over the used cells of each day, or of each day and group."""

    def __init__(self, used: Tensor, groups: Tensor | None) -> None:
        self._used = used
        self._numbers: Tensor | None = None
        if groups is not None:
            sorted_groups, order = sort_days(groups)
            first, _ = run_bounds(sorted_groups[:, 1:] != sorted_groups[:, :-1])
            self._numbers = _unsort(first, order)

    def compute_totals(self, values: Tensor) -> Tensor:
        """Return the sum that each cell belongs to, `[D, 1]` or `[D, N]`."""
        values = values.masked_fill(~self._used, 0)
        if self._numbers is None:
            return values.sum(1, keepdim=True)
        totals = torch.zeros_like(values).scatter_add_(1, self._numbers, values)
        return totals.gather(1, self._numbers)


KERNELS: dict[str, DayKernel] = {
    "CSRank": _rank,
    "CSZScore": _zscore,
    "CSScale": _scale,
    "CSDemean": _demean,
}
_USES_INFINITY = {"CSRank"}  # for the others an infinite value is missing


def compute_day_step(
    step: Step, plan: Plan, stored: dict[int, Tensor], block: Block, *, num_threads: int
) -> Tensor:
    """Compute a step that compares the instruments of a day, `[D, N]` of the step's dtype.

    `block` has all instruments. Results are NaN where an instrument is not a member of the
    universe, has no value, or has no group.
    """
    members = block.bars.mask & block.is_stored
    arguments = [_read_argument(a, plan, stored, block) for a in step.arguments]
    operator = get_operators()[step.operator]
    if operator.function is not None:
        return _call_user_function(operator, step, arguments, members)
    kernel = KERNELS[step.operator]
    result = torch.empty(members.shape, dtype=step.dtype, device=block.device)

    def run(rows: slice) -> None:
        values, *group_arguments = (a[rows] for a in arguments if isinstance(a, Tensor))
        groups = group_arguments[0].to(torch.float64) if group_arguments else None
        used = members[rows] & ~values.isnan()
        if step.operator not in _USES_INFINITY:
            used, values = used & values.isfinite(), values.to(torch.float64)
        if groups is not None:
            used = used & ~groups.isnan()
            groups = groups.masked_fill(~used, torch.inf)
        with torch.no_grad():  # by thread
            result[rows] = (
                kernel(values, used, groups).masked_fill_(~used, torch.nan).to(step.dtype)
            )

    num_cells = _CELLS if block.device.type == "cpu" else _DEVICE_CELLS
    num_rows = max(1, num_cells // max(1, block.num_columns))
    chunks = [slice(k, k + num_rows) for k in range(0, block.num_rows, num_rows)]
    map_threads(run, chunks, min(len(chunks), num_threads))
    return result


def _read_argument(
    argument: int | Number | Text, plan: Plan, stored: dict[int, Tensor], block: Block
) -> Tensor | int | float | str:
    if not isinstance(argument, int):
        return argument.value
    node = plan.steps[argument].node
    return block.load(node) if isinstance(node, Field) else block.as_numbers(stored[argument])


def _call_user_function(
    operator: Operator, step: Step, arguments: list[Tensor | int | float | str], members: Tensor
) -> Tensor:
    assert operator.function is not None
    result = operator.function(
        *(a.masked_fill(~members, torch.nan) if isinstance(a, Tensor) else a for a in arguments)
    )
    check_result(operator.name, result, tuple(members.shape))
    return result.to(step.dtype).masked_fill(~members, torch.nan)


def check_result(name: str, result: object, shape: tuple[int, ...]) -> None:
    """Raise ExpressionError unless the result of a user's operator is a tensor of a shape."""
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        actual = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ExpressionError(
            f"the operator {name!r} returned {actual}; expected a tensor {shape} "
            "(dates, instruments), the shape of its arguments."
        )
