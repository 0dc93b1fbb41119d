"""Operators on other rows or other instruments: Ref, Delta, EMA, Mad, Mask."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.core.errors import unknown_name_message
from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.parser import Call, Text, expression_error
from qtorch.data.expression.plan import Step, make_plan
from qtorch.data.expression.series import Block


def _shift(block: Block, values: Tensor, lag: int) -> Tensor:
    """Shift values by `lag` rows (ahead if negative).

    As in Qlib, lag 0 means the value of each instrument's first stored row on all its rows.
    """
    rows = block.num_rows
    if lag == 0:
        first = values.gather(0, block.first.clamp(max=max(rows - 1, 0))[None])
        return block.mask_outside_span(first.expand_as(values).clone(), head=True)
    result = torch.empty_like(values)
    if lag > 0:
        num_missing = min(lag, rows)
        result[:num_missing] = torch.nan
        result[num_missing:] = values[: rows - num_missing]
        return block.mask_outside_span(result)
    num_missing = min(-lag, rows)
    result[rows - num_missing :] = torch.nan
    result[: rows - num_missing] = values[num_missing:]
    return block.mask_outside_span(result, head=True)


def _ref(executor: Executor, step: Step) -> Tensor:
    return _shift(executor.block, executor.get_numbers(step), int(step.constants[0]))


def _delta(executor: Executor, step: Step) -> Tensor:
    values = executor.get_numbers(step)
    return values - _shift(executor.block, values, int(step.constants[0]))


# -- exponential means -----------------------------------------------------------------------------


def _exponential_mean(executor: Executor, step: Step) -> Tensor:
    """Compute pandas' adjusted exponential mean; weights decay on missing days too."""
    series, window = executor.get_series(step), step.constants[0]
    block = executor.block
    if window == 0:
        mean = _expanding_exponential_mean(executor, step)
    else:
        alpha = window if 0 < window < 1 else 2 / (window + 1)
        total = _decaying_sum(series.values_or_zero.to(torch.float64), 1 - alpha)
        weight = _decaying_sum(series.rows.valid.to(torch.float64), 1 - alpha)
        mean = _fill_forward(total / weight, series.rows.valid)
    return block.mask_outside_span(mean.to(step.dtype))


def _decaying_sum(base: Tensor, keep: float) -> Tensor:
    """Compute `y[t] = base[t] + keep * y[t - 1]` by doubling: k passes cover 2**k rows."""
    total, shift, factor = base, 1, keep
    while shift < len(base) and factor > 0:
        longer = total.clone()
        longer[shift:].add_(total[:-shift], alpha=factor)
        total, shift, factor = longer, shift * 2, factor * factor
    return total


def _fill_forward(values: Tensor, valid: Tensor) -> Tensor:
    """Replace values of invalid rows by the last valid value (NaN before the first)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    latest = torch.where(valid > 0, rows, -1).cummax(0).values
    return values.gather(0, latest.clamp(min=0)).masked_fill_(latest < 0, torch.nan)


def _expanding_exponential_mean(executor: Executor, step: Step) -> Tensor:
    """Compute EMA with window 0, over all past rows.

    The L-th stored row of an instrument, counted from 1, has the weights `(1 - 2/(1 + L)) ** lag`.

    The weights depend on the row, so a `[D, D]` matrix is multiplied with the series, after each
    instrument has been shifted to start at its first stored row.
    """
    series, block = executor.get_series(step), executor.block
    rows = torch.arange(block.num_rows, device=block.device)
    source = rows[:, None] + block.first
    is_past_end = source >= block.num_rows
    aligned_values = series.values_or_zero.to(torch.float64).gather(
        0, source.clamp(max=block.num_rows - 1)
    )
    lag = (rows[:, None] - rows).to(torch.float64)
    keep = (1 - 2 / (2 + rows.to(torch.float64)))[:, None]
    weights = torch.where(lag >= 0, keep ** lag.clamp(min=0), 0.0)
    weights /= weights.sum(1, keepdim=True)
    mean = weights @ aligned_values.masked_fill_(is_past_end, 0.0)
    row_in_span = (rows[:, None] - block.first).clamp(min=0)
    # As in pandas, one value in the window is enough, no matter how old it is.
    has_value = (series.rows.valid > 0).cumsum(0) > 0
    return mean.gather(0, row_in_span).masked_fill_(~has_value, torch.nan)


# -- mean absolute deviation -----------------------------------------------------------------------


def _mean_absolute_deviation(executor: Executor, step: Step) -> Tensor:
    series = executor.get_series(step)
    window, rows = executor.get_window(step), series.rows
    mean = series.sum("sum", window).to(torch.float64) * rows.inverse_count(window)
    total = torch.zeros_like(mean)
    for lag in range(window):
        distance = (series.values_or_zero[: len(mean) - lag] - mean[lag:]).abs_()
        distance *= rows.valid[: len(mean) - lag]
        total[lag:] += distance
    return executor.block.mask_outside_span(total.mul_(rows.inverse_count(window)).to(step.dtype))


# -- another instrument ----------------------------------------------------------------------------


def _mask(executor: Executor, step: Step) -> Tensor:
    """Evaluate the inner expression on the rows of the other instrument and copy it to all.

    The result is NaN outside each instrument's own span. Raises ExpressionError with the nearest
    name if the bars do not have the other instrument.
    """
    node, block = step.node, executor.block
    assert isinstance(node, Call)
    name = node.arguments[1]
    assert isinstance(name, Text)
    all_bars = [block.bars] if block.mask_bars is None else [block.bars, block.mask_bars]
    for bars in all_bars:
        names_by_lower = {i.lower(): i for i in bars.instruments}
        if name.value.lower() in names_by_lower:
            place = list(bars.instruments).index(names_by_lower[name.value.lower()])
            break
    else:
        raise expression_error(
            name.span, unknown_name_message("instrument", name.value, block.bars.instruments)
        )
    inner_block = Block(bars, place, place + 1, mask_bars=block.mask_bars)
    column = torch.empty((block.num_rows, 1, 1), device=block.device)
    executor.for_block(inner_block, make_plan([node.arguments[0]])).run(column)
    values = column[:, :, 0].expand(-1, block.num_columns).contiguous()
    return block.mask_outside_span(values.to(step.dtype), head=True)


KERNELS: dict[str, Kernel] = {
    "Ref": _ref,
    "Delta": _delta,
    "EMA": _exponential_mean,
    "Mad": _mean_absolute_deviation,
    "Mask": _mask,
}
