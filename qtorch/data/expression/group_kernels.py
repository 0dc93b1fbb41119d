"""Rolling operators on stacks of series: several columns and windows by one operation each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtorch.data.expression.grouped import GroupExecutor, GroupOperator, GroupResult
from qtorch.data.expression.parser import Field
from qtorch.data.expression.stacked import (
    Moments,
    Sums,
    WindowStack,
    count_cells,
    finite_cells,
    stack_series,
    take_series,
    trailing_windows,
)

_INFINITE = float("inf")
# The range of int32, and the smallest int64.
_LOWEST, _HIGHEST, _LOWEST_KEY = -(2**31), 2**31 - 1, -(2**63)
# The values of windows that are compared or sorted at once; CUDA sorts less than 2**31.
MAX_WINDOW_VALUES = 2**30
# Squared deviations of up to 2e-5 are none in Qlib's Corr and Rsquare.
_MIN_VARIANCE = 4e-10


def _distinct_series(executor: GroupExecutor, members: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(executor.plan.steps[at].inputs[0] for at in members))


def _place_members(
    executor: GroupExecutor,
    values: Tensor,
    members: Sequence[int],
    series: Sequence[int],
    chain: WindowStack,
    *,
    head: bool = False,
) -> GroupResult:
    """Blank the rows outside the spans in `values [W, S, D, n]`, and say where the members are."""
    executor.block.mask_outside_span(values, head=head)
    places = {}
    for at in members:
        step = executor.plan.steps[at]
        window = chain.position(executor.get_window(step))
        places[at] = window * len(series) + series.index(step.inputs[0])
    return GroupResult(values.reshape(-1, *values.shape[2:]), places)


# -- sums ------------------------------------------------------------------------------------------


def _sum_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Compute Sum, Mean and Count of all series from one set of sums."""
    parts = _split_by_operator(executor, members)
    series = {operator: _distinct_series(executor, part) for operator, part in parts.items()}
    numbers = [executor.get_step_numbers(i) for part in series.values() for i in part]
    sums = Sums(stack_series(numbers), executor.group_windows(members[0]))
    results, first = [], 0
    for operator, part in parts.items():
        own = slice(first, first + len(series[operator]))
        first = own.stop
        totals, counts = sums.totals[:, own], sums.counts[:, own]
        if operator == "Sum":
            values = torch.where(counts > 0, totals, torch.nan)
        else:
            values = counts.clone() if operator == "Count" else totals * counts.reciprocal()
        head = operator == "Count"
        results.append(
            _place_members(executor, values, part, series[operator], sums.chain, head=head)
        )
    return results


def _split_by_operator(executor: GroupExecutor, members: Sequence[int]) -> dict[str, list[int]]:
    parts: defaultdict[str, list[int]] = defaultdict(list)
    for at in members:
        parts[executor.plan.steps[at].operator].append(at)
    return dict(parts)


# -- moments ---------------------------------------------------------------------------------------


def _moment_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Compute Std, Var, Slope, Resi, Rsquare, Corr and Cov from one set of pairs.

    The pair of a single series is its row numbers.
    """
    steps = executor.plan.steps
    inputs = [steps[at].inputs for at in members]
    pairs = list(dict.fromkeys(i for i in inputs if len(i) == 2))
    singles = [(i,) for i in dict.fromkeys(i for each in inputs for i in each)]
    row_numbers = executor.block.rows.to(torch.float32)
    row_numbers = row_numbers.expand(-1, executor.block.num_columns)
    numbers = {i: executor.get_step_numbers(i) for (i,) in singles}
    x = stack_series([numbers[key[0]] for key in (*singles, *pairs)], torch.float64)
    right_sides = [*(row_numbers for _ in singles), *(numbers[right] for _, right in pairs)]
    moments = Moments(
        x, stack_series(right_sides, torch.float64), executor.group_windows(members[0])
    )
    positions = {key: k for k, key in enumerate((*singles, *pairs))}
    parts: defaultdict[tuple[str, torch.dtype, bool], list[int]] = defaultdict(list)
    for at in members:
        step = steps[at]
        parts[step.operator, step.dtype, step.constants[0] == 0].append(at)
    results = []
    for (operator, dtype, is_expanding), part in parts.items():
        keys = list(dict.fromkeys(steps[at].inputs for at in part))
        places = [positions[key] for key in keys]
        if operator == "Corr":
            sides = [[positions[key[:1]] for key in keys], [positions[key[1:]] for key in keys]]
            values = _correlation(moments, places, sides, dtype)
        elif operator == "Std":
            values = _variance(moments, places).to(dtype).sqrt_()
        elif operator == "Rsquare" and is_expanding:
            values = _rsquare(moments, places, 0.0)
        else:
            values = _MOMENTS[operator](moments, places)
        executor.block.mask_outside_span(values)
        num_keys = len(keys)
        offsets = {
            at: moments.chain.position(executor.get_window(steps[at])) * num_keys
            + keys.index(steps[at].inputs)
            for at in part
        }
        results.append(GroupResult(values.reshape(-1, *values.shape[2:]), offsets))
    return results


def _variance(moments: Moments, places: Sequence[int]) -> Tensor:
    return moments.squares(places) * moments.inverse_dof(places)


def _covariance(moments: Moments, places: Sequence[int]) -> Tensor:
    return moments.codeviations(places) * moments.inverse_dof(places)


def _slope(moments: Moments, places: Sequence[int]) -> Tensor:
    return moments.codeviations(places) * moments.inverse_row_deviations(places)


def _residual(moments: Moments, places: Sequence[int]) -> Tensor:
    """Compute today's distance from the regression line; NaN where today has no value."""
    means, today = take_series(moments.means, places, 2), take_series(moments.values, places, 1)
    estimate = (today[1] - means[:, 1]).mul_(_slope(moments, places)).add_(means[:, 0])
    residual = torch.sub(today[0], estimate, out=estimate)
    return residual.masked_fill_(~take_series(moments.valid, places, 0), torch.nan)


def _rsquare(
    moments: Moments, places: Sequence[int], min_variance: float = _MIN_VARIANCE
) -> Tensor:
    inverse_dof = moments.inverse_dof(places)
    variance = torch.threshold(moments.squares(places) * inverse_dof, min_variance, torch.nan)
    result = moments.codeviations(places).square().div_(variance)
    return result.mul_(moments.inverse_row_deviations(places) * inverse_dof).clamp_(max=1)


def _correlation(
    moments: Moments,
    places: Sequence[int],
    sides: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> Tensor:
    """Compute correlations; the smallest variance applies to all rows of each of both `sides`."""
    inverse_dof = moments.inverse_dof(places)
    deviations = []
    for side, originals in enumerate(sides):
        variance = moments.squares(places, side) * inverse_dof
        original = torch.threshold(_variance(moments, originals), _MIN_VARIANCE, torch.nan)
        deviations.append(variance.add_(original.mul_(0)).to(dtype).sqrt_())
    covariance = (moments.codeviations(places) * inverse_dof).to(dtype)
    return covariance.div_(deviations[0].mul_(deviations[1])).clamp_(-1, 1)


_MOMENTS: dict[str, Callable[[Moments, Sequence[int]], Tensor]] = {
    "Var": _variance,
    "Cov": _covariance,
    "Slope": _slope,
    "Resi": _residual,
    "Rsquare": _rsquare,
}


# -- extremes and their rows -----------------------------------------------------------------------


def _split_sides(
    executor: GroupExecutor, members: Sequence[int], largest: str
) -> tuple[list[int], list[int], Tensor]:
    """Return the members of maxima, those of minima, and their series `[S, D, n]`.

    The series of minima are negated, so that a maximum serves both. Infinite values are missing.
    """
    steps = executor.plan.steps
    top = [at for at in members if steps[at].operator == largest]
    bottom = [at for at in members if steps[at].operator != largest]
    values = [executor.get_step_numbers(i) for i in _distinct_series(executor, top)]
    values += [-executor.get_step_numbers(i) for i in _distinct_series(executor, bottom)]
    stack = stack_series(values)
    return top, bottom, stack + stack * 0


def _extreme_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    top, bottom, values = _split_sides(executor, members, "Max")
    chain = WindowStack(executor.group_windows(members[0]), overlap=True)
    base = torch.nan_to_num(values, nan=-_INFINITE)
    extremes = chain.results(chain.join(base, torch.maximum, -_INFINITE))
    extremes = extremes.masked_fill(extremes == -_INFINITE, torch.nan)
    results = []
    for part, sign in ((top, 1), (bottom, -1)):
        if part:
            series = _distinct_series(executor, part)
            first = 0 if part is top else len(values) - len(series)
            own = extremes[:, first : first + len(series)]
            own = -own if sign < 0 else own
            results.append(_place_members(executor, own, part, series, chain))
    return results


def _position_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Compute the positions of extremes in their windows: the first NaN, else the first tie.

    The keys are those of `rolling._extreme_rows`.
    """
    block = executor.block
    top, bottom, values = _split_sides(executor, members, "IdxMax")
    chain = WindowStack(executor.group_windows(members[0]))
    bits = (values + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & _HIGHEST)
    bits = bits.masked_fill_(values.isnan(), _HIGHEST)
    if not block.is_full:
        bits.masked_fill_(~block.is_stored, _LOWEST)
    from_end = block.num_rows - block.rows.to(torch.int64)
    keys = chain.join((bits.to(torch.int64) << 32) | from_end, torch.maximum, _LOWEST_KEY)
    rows_from_end = (chain.results(keys) & 0xFFFFFFFF).to(torch.float32)
    is_stored = block.is_stored.to(torch.float64)[None]
    counts = count_cells(torch.cat([is_stored, finite_cells(values)]), chain).to(torch.float32)
    lengths, counts = counts[:, :1], counts[:, 1:]
    positions = lengths + (block.num_rows - block.rows.to(torch.float32)) - rows_from_end
    positions.masked_fill_(counts == 0, torch.nan)
    results = []
    for part in (top, bottom):
        if part:
            series = _distinct_series(executor, part)
            first = 0 if part is top else len(values) - len(series)
            own = positions[:, first : first + len(series)]
            results.append(_place_members(executor, own, part, series, chain, head=True))
    return results


# -- ranks and quantiles ---------------------------------------------------------------------------


def _finite_numbers(executor: GroupExecutor, series: Sequence[int]) -> Tensor:
    """Return series `[S, D, n]` with infinity replaced by NaN."""
    stack = stack_series([executor.get_step_numbers(i) for i in series])
    return stack + stack * 0


def _rank_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Compare today's value with all earlier ones of the longest window at once."""
    series = _distinct_series(executor, members)
    values = _finite_numbers(executor, series)
    chain = WindowStack(executor.group_windows(members[0]))
    counts = executor.count_values(series, values, chain)
    windows = chain.windows
    parts = [_rank_margins(part, windows) for part in _column_parts(values, max(windows))]
    margin = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    dtype = values.dtype
    ranks = (margin + (counts + 1).to(dtype)).mul_((0.5 / counts).to(dtype))
    ranks.masked_fill_(values.isnan(), torch.nan)
    return [_place_members(executor, ranks, members, series, chain)]


def _rank_margins(values: Tensor, windows: Sequence[int]) -> Tensor:
    """Return how many values of each window are smaller than today's, minus those larger."""
    longest = max(windows)
    signs = (values[:, None] - trailing_windows(values, longest, torch.nan)).sign_()
    signs.nan_to_num_(nan=0.0)
    margins, margin, previous = {}, torch.zeros_like(values), 1
    for window in sorted(windows):
        # Row `longest - 1` of a window is today, `longest - window` its first.
        if window > previous:
            margin = margin + signs[:, longest - window : longest - previous].sum(1)
        margins[window], previous = margin, window
    return torch.stack([margins[w] for w in windows])


def _column_parts(values: Tensor, window: int) -> tuple[Tensor, ...]:
    """Split series `[S, D, n]` so that the rows of all windows are not too many at once."""
    num_values = values.shape[0] * values.shape[1] * window
    return torch.split(values, max(1, MAX_WINDOW_VALUES // num_values), -1)


def _quantile_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Sort every window, and interpolate between two places that depend on the window's count."""
    steps = executor.plan.steps
    series = _distinct_series(executor, members)
    levels = list(dict.fromkeys(_level(steps[at]) for at in members))
    windows = executor.group_windows(members[0])
    chain = WindowStack(windows)
    values = _finite_numbers(executor, series)
    counts = executor.count_values(series, values, chain)
    last = take_series(counts, [chain.position(w) for w in windows], 0).sub(1).clamp_(min=0)
    places = torch.stack([last * level for level in levels], -1)  # [W, S, D, n, Q]
    low = places.floor()
    shares = places - low
    index = torch.cat([low, places.ceil_()], -1).to(torch.int64)
    missing_last = torch.nan_to_num(values, nan=_INFINITE)
    neighbours = []
    for k, window in enumerate(windows):
        parts, first = [], 0
        for part in _column_parts(missing_last, window):
            rows = trailing_windows(part, window, _INFINITE).movedim(1, -1)
            columns = slice(first, first + part.shape[-1])
            parts.append(rows.sort(-1).values.gather(-1, index[k][:, :, columns]))
            first = columns.stop
        neighbours.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    below, above = torch.stack(neighbours).to(torch.float64).chunk(2, -1)
    # All values of an empty window are infinite, and inf - inf is NaN.
    quantiles = (below + (above - below).mul_(shares)).movedim(-1, 1).contiguous()
    executor.block.mask_outside_span(quantiles)
    stack = quantiles.reshape(-1, *values.shape[1:])  # [W * Q * S, D, n]
    offsets = {}
    for at in members:
        step = steps[at]
        window = windows.index(executor.get_window(step)) * len(levels)
        row = (window + levels.index(_level(step))) * len(series)
        offsets[at] = row + series.index(step.inputs[0])
    return [GroupResult(stack, offsets)]


def _level(step: Any) -> float:
    return float(step.constants[1]) if step.operator == "Quantile" else 0.5


# -- fields and other rows -------------------------------------------------------------------------


def _field_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    nodes = [executor.plan.steps[at].node for at in members]
    stack = executor.block.load_all([node for node in nodes if isinstance(node, Field)])
    return [GroupResult(stack, {at: k for k, at in enumerate(members)})]


def _shift_kernel(executor: GroupExecutor, members: Sequence[int]) -> list[GroupResult]:
    """Compute Ref by several lags of one sign as parts of a padded series."""
    block, steps = executor.block, executor.plan.steps
    values = executor.get_step_numbers(steps[members[0]].inputs[0])
    lags = list(dict.fromkeys(int(steps[at].constants[0]) for at in members))
    padding, rows = max(abs(lag) for lag in lags), block.num_rows
    is_past = lags[0] > 0
    padded = values.new_full((padding + rows, block.num_columns), torch.nan)
    start = padding if is_past else 0
    padded[start : start + rows] = values
    stack = torch.stack([padded[start - lag : start - lag + rows] for lag in lags])
    block.mask_outside_span(stack, head=not is_past)
    return [GroupResult(stack, {at: lags.index(int(steps[at].constants[0])) for at in members})]


# The rows that are compared or sorted at once grow with the window.
_MAX_WINDOW = 256
GROUP_OPERATORS: dict[str, GroupOperator] = {
    "Field": GroupOperator("field", _field_kernel),
    "Ref": GroupOperator("shift", _shift_kernel),
    **dict.fromkeys(("Sum", "Mean", "Count"), GroupOperator("sum", _sum_kernel)),
    **dict.fromkeys((*_MOMENTS, "Std", "Corr"), GroupOperator("moment", _moment_kernel)),
    **dict.fromkeys(("Max", "Min"), GroupOperator("extreme", _extreme_kernel, is_exact=True)),
    **dict.fromkeys(
        ("IdxMax", "IdxMin"), GroupOperator("position", _position_kernel, allows_float64=False)
    ),
    "Rank": GroupOperator("rank", _rank_kernel, _MAX_WINDOW, is_exact=True),
    **dict.fromkeys(
        ("Quantile", "Med"),
        GroupOperator("quantile", _quantile_kernel, _MAX_WINDOW, is_exact=True),
    ),
}


class DeviceExecutor(GroupExecutor):
    """Executes a stage on a GPU."""

    operators = GROUP_OPERATORS
