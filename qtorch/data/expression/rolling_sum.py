"""Rolling operators made of sums: mean, variance, skewness, regression, correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series

_NAN = float("nan")


def _narrowed(values: Tensor, step: Step) -> Tensor:
    return values.to(step.dtype)


# -- moments ---------------------------------------------------------------------------------------


def _sum(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    # The sum is shared with other operators: what is changed in place must be a copy.
    total = series.sum("sum", window).to(step.dtype, copy=True)
    return machine.block.seal(series.rows.void(total, window))


def _mean(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    mean = series.sum("sum", window) * series.rows.per_count(window)
    return machine.block.seal(_narrowed(mean, step))


def _variance(machine: Machine, step: Step) -> Tensor:
    variance = machine.series(step).variance(machine.window(step))
    return machine.block.seal(variance.to(step.dtype, copy=True))


def _deviation(machine: Machine, step: Step) -> Tensor:
    variance = machine.series(step).variance(machine.window(step))
    narrow = variance.to(step.dtype)
    deviation = narrow.sqrt() if narrow is variance else narrow.sqrt_()
    return machine.block.seal(deviation)


def _count(machine: Machine, step: Step) -> Tensor:
    counted = machine.series(step).rows.count(machine.window(step))
    return machine.block.seal(
        counted.to(torch.float32).expand(machine.block.inside.shape).clone(), head=True
    )


def _central_moments(series: Series, window: int, highest: int) -> list[Tensor]:
    """The central moments 2..highest of each window, lag by lag about the window's own mean.

    Sums of powers would be quicker, but leave no digit of a fourth moment that is small beside
    the price's distance from whatever they were centred on.
    """
    rows, filled = series.rows, series.filled
    mean = series.sum("sum", window).to(torch.float64) * rows.per_count(window)
    moments = [torch.zeros_like(mean) for _ in range(2, highest + 1)]
    for lag in range(window):
        deviation = (filled[: len(mean) - lag] - mean[lag:]).mul_(rows.valid[: len(mean) - lag])
        power = deviation
        for moment in moments:
            power = power * deviation
            moment[lag:] += power
    return [moment.mul_(rows.per_count(window)) for moment in moments]


def _skewness(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    n = series.rows.count(window)
    second, third = _central_moments(series, window, 3)
    skew = (n * (n - 1)).sqrt() / (n - 2) * third / second**1.5
    return machine.block.seal(_narrowed(_unless_flat(skew, series, window, 3), step))


def _kurtosis(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    n = series.rows.count(window)
    second, _, fourth = _central_moments(series, window, 4)
    kurt = ((n * n - 1) * fourth / second**2 - 3 * (n - 1) ** 2) / ((n - 2) * (n - 3))
    return machine.block.seal(_narrowed(_unless_flat(kurt, series, window, 4), step))


def _unless_flat(values: Tensor, series: Series, window: int, least: int) -> Tensor:
    """NaN where there are too few values, or one value only: its higher moments are rounding."""
    values.masked_fill_(series.variance(window) == 0, _NAN)
    return values.masked_fill_(series.rows.count(window) < least, _NAN)


# -- regression on the row number ------------------------------------------------------------------


def _codeviation(series: Series, window: int) -> Tensor:
    """Sum of products of the deviations of value and row number.

    Rows without a value leave a gap in the row numbers; they do not close up.
    """
    total, position = series.sum("sum", window), series.sum("position", window)
    return torch.addcmul(position, series.rows.mean_row(window), total, value=-1)


def _slope(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    slope = _codeviation(series, window).mul_(series.rows.per_row_deviation(window))
    return machine.block.seal(_narrowed(slope, step))


def _residual(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    rows = series.rows
    ahead = machine.block.rows - rows.mean_row(window)
    fitted = _codeviation(series, window).mul_(rows.per_row_deviation(window) * ahead)
    fitted.addcmul_(series.sum("sum", window).to(torch.float64), rows.per_count(window))
    residual = torch.sub(series.filled, fitted, out=fitted)
    return machine.block.seal(rows.reopen(_narrowed(residual, step)))


def _r_squared(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), machine.window(step)
    rows = series.rows
    if step.numbers[0]:
        variance = series.guarded_variance(window)
    else:  # Qlib leaves the expanding form unguarded; a flat series has no R squared all the same
        variance = torch.threshold(series.variance(window), 0.0, _NAN)
    result = _codeviation(series, window).square_().div_(variance)
    result.mul_(rows.per_row_deviation(window) * rows.per_freedom(window))
    return machine.block.seal(_narrowed(result, step))


def _weighted_mean(machine: Machine, step: Step) -> Tensor:
    """Weights 1..L over the L rows of the window, divided by their sum and by the value count.

    The second division is Qlib's (its mean of weighted values), so a WMA is about 1/L of a mean.
    """
    series, window = machine.series(step), machine.window(step)
    length = machine.block.lengths(window)
    before = machine.block.rows - length
    total = torch.addcmul(
        series.sum("position", window),
        series.sum("sum", window).to(torch.float64),
        before,
        value=-1,
    )
    total.div_(length * (length + 1) / 2).mul_(series.rows.per_count(window))
    return machine.block.seal(_narrowed(total, step))


# -- two series ------------------------------------------------------------------------------------


def _covariance(machine: Machine, step: Step) -> Tensor:
    pair, window = machine.pair(step), machine.window(step)
    covariance = pair.codeviation(window).mul_(pair.left.rows.per_freedom(window))
    return machine.block.seal(_narrowed(covariance, step))


def _correlation(machine: Machine, step: Step) -> Tensor:
    pair, window = machine.pair(step), machine.window(step)
    covariance = pair.codeviation(window).mul_(pair.left.rows.per_freedom(window))
    sides = []
    for side, alone in zip((pair.left, pair.right), pair.alone, strict=True):
        variance = alone.guarded_variance(window)
        if side is not alone:  # the guard looks at each side's own rows
            variance = side.variance(window) + variance * 0
        sides.append(variance.to(step.dtype))
    deviation = sides[0].sqrt().mul_(sides[1].sqrt())
    # Two or three pairs that hardly move give a quotient of rounding, but never more than 1.
    return machine.block.seal(_narrowed(covariance, step).div_(deviation).clamp_(-1, 1))


KERNELS: dict[str, Kernel] = {
    "Sum": _sum,
    "Mean": _mean,
    "Var": _variance,
    "Std": _deviation,
    "Count": _count,
    "Skew": _skewness,
    "Kurt": _kurtosis,
    "Slope": _slope,
    "Resi": _residual,
    "Rsquare": _r_squared,
    "WMA": _weighted_mean,
    "Cov": _covariance,
    "Corr": _correlation,
}
