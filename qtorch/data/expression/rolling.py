"""Rolling operators: sums, moments, regression, correlation, extremes, their rows, and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series, rolling_extremes, window_chain

# The range of int32.
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


# -- moments ---------------------------------------------------------------------------------------


def _sum(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    # The sum is shared with other operators, and the mask below works in place: copy it.
    total = series.sum("sum", window).to(step.dtype, copy=True)
    return executor.block.mask_outside_span(series.rows.mask_empty(total, window))


def _mean(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    mean = series.sum("sum", window) * series.rows.inverse_count(window)
    return executor.block.mask_outside_span(mean.to(step.dtype))


def _variance(executor: Executor, step: Step) -> Tensor:
    variance = executor.get_series(step).variance(executor.get_window(step))
    return executor.block.mask_outside_span(variance.to(step.dtype, copy=True))


def _standard_deviation(executor: Executor, step: Step) -> Tensor:
    variance = executor.get_series(step).variance(executor.get_window(step))
    cast_variance = variance.to(step.dtype)
    deviation = cast_variance.sqrt() if cast_variance is variance else cast_variance.sqrt_()
    return executor.block.mask_outside_span(deviation)


def _count(executor: Executor, step: Step) -> Tensor:
    count = executor.get_series(step).rows.count(executor.get_window(step))
    return executor.block.mask_outside_span(
        count.to(torch.float32).expand(executor.block.is_stored.shape).clone(), head=True
    )


def _central_moments(series: Series, window: int, max_order: int) -> list[Tensor]:
    """Compute the central moments 2..max_order of each window, lag by lag around its mean.

    Rolling sums of powers would be faster, but they lose all digits of a fourth moment that is
    small compared to the distance between the price and the point that they are centered on.
    """
    rows, values = series.rows, series.values_or_zero
    mean = series.sum("sum", window).to(torch.float64) * rows.inverse_count(window)
    moments = [torch.zeros_like(mean) for _ in range(2, max_order + 1)]
    for lag in range(window):
        deviation = (values[: len(mean) - lag] - mean[lag:]).mul_(rows.valid[: len(mean) - lag])
        power = deviation
        for moment in moments:
            power = power * deviation
            moment[lag:] += power
    return [moment.mul_(rows.inverse_count(window)) for moment in moments]


def _skewness(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    n = series.rows.count(window)
    second, third = _central_moments(series, window, 3)
    skew = (n * (n - 1)).sqrt() / (n - 2) * third / second**1.5
    skew = _mask_flat(skew, series, window, 3)
    return executor.block.mask_outside_span(skew.to(step.dtype))


def _kurtosis(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    n = series.rows.count(window)
    second, _, fourth = _central_moments(series, window, 4)
    kurt = ((n * n - 1) * fourth / second**2 - 3 * (n - 1) ** 2) / ((n - 2) * (n - 3))
    kurt = _mask_flat(kurt, series, window, 4)
    return executor.block.mask_outside_span(kurt.to(step.dtype))


def _mask_flat(values: Tensor, series: Series, window: int, min_count: int) -> Tensor:
    """Set windows with too few or only equal values, which have no higher moments, to NaN."""
    values.masked_fill_(series.variance(window) == 0, torch.nan)
    return values.masked_fill_(series.rows.count(window) < min_count, torch.nan)


# -- regression on the row number ------------------------------------------------------------------


def _slope(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    slope = series.row_codeviation(window).mul_(series.rows.inverse_row_deviation(window))
    return executor.block.mask_outside_span(slope.to(step.dtype))


def _residual(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    rows = series.rows
    distance = executor.block.rows - rows.mean_row(window)
    estimate = series.row_codeviation(window).mul_(rows.inverse_row_deviation(window) * distance)
    estimate.addcmul_(series.sum("sum", window).to(torch.float64), rows.inverse_count(window))
    residual = torch.sub(series.values_or_zero, estimate, out=estimate)
    return executor.block.mask_outside_span(rows.mask_missing(residual.to(step.dtype)))


def _rsquare(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    rows = series.rows
    if step.constants[0]:
        variance = series.variance_or_nan(window)
    else:  # Qlib has no threshold for all past rows, but a flat series still has no R squared
        variance = torch.threshold(series.variance(window), 0.0, torch.nan)
    result = series.row_codeviation(window).square_().div_(variance)
    result.mul_(rows.inverse_row_deviation(window) * rows.inverse_dof(window)).clamp_(max=1)
    return executor.block.mask_outside_span(result.to(step.dtype))


def _wma(executor: Executor, step: Step) -> Tensor:
    """Compute a mean with weights 1..L over the L rows, divided again by the number of values.

    The second division follows Qlib, which takes the mean of the weighted values, so that a WMA
    is about 1/L of a weighted mean.
    """
    series, window = executor.get_series(step), executor.get_window(step)
    length = executor.block.window_lengths(window)
    row_before_window = executor.block.rows - length
    total = torch.addcmul(
        series.sum("position", window),
        series.sum("sum", window).to(torch.float64),
        row_before_window,
        value=-1,
    )
    total.div_(length * (length + 1) / 2).mul_(series.rows.inverse_count(window))
    return executor.block.mask_outside_span(total.to(step.dtype))


# -- two series ------------------------------------------------------------------------------------


def _covariance(executor: Executor, step: Step) -> Tensor:
    pair, window = executor.get_pair(step), executor.get_window(step)
    covariance = pair.codeviation(window).mul_(pair.left.rows.inverse_dof(window))
    return executor.block.mask_outside_span(covariance.to(step.dtype))


def _correlation(executor: Executor, step: Step) -> Tensor:
    pair, window = executor.get_pair(step), executor.get_window(step)
    covariance = pair.codeviation(window).mul_(pair.left.rows.inverse_dof(window))
    variances = []
    for side, original in zip((pair.left, pair.right), pair.originals, strict=True):
        variance = original.variance_or_nan(window)
        if side is not original:  # the threshold applies to all rows of each side
            variance = side.variance(window) + variance * 0
        variances.append(variance.to(step.dtype))
    deviation = variances[0].sqrt().mul_(variances[1].sqrt())
    # For two or three nearly constant pairs the quotient is a rounding error; keep it in -1..1.
    correlation = covariance.to(step.dtype).div_(deviation).clamp_(-1, 1)
    return executor.block.mask_outside_span(correlation)


# -- extremes, their rows, and ranks ---------------------------------------------------------------


def _extreme_kernel(*, largest: bool) -> Kernel:
    family = "max" if largest else "min"
    fill_value = float("-inf") if largest else float("inf")

    def build(series: Series) -> dict[int, Tensor]:
        base = series.numbers
        if series.rows.has_missing:
            base = torch.nan_to_num(base, nan=fill_value)
        return rolling_extremes(base, series.windows(family), largest=largest)

    def kernel(executor: Executor, step: Step) -> Tensor:
        series, window = executor.get_series(step), executor.get_window(step)
        extremes = series.compute_windows(family, lambda: build(series))[window]
        return executor.block.mask_outside_span(series.rows.mask_empty(extremes.clone(), window))

    return kernel


def _position_kernel(*, largest: bool) -> Kernel:
    family = "argmax" if largest else "argmin"

    def kernel(executor: Executor, step: Step) -> Tensor:
        series, window = executor.get_series(step), executor.get_window(step)
        rows = series.compute_windows(family, lambda: _extreme_rows(series, family, largest))
        position = rows[window] - (executor.block.first_rows(window) - 1).to(torch.float32)
        return executor.block.mask_outside_span(series.rows.mask_empty(position, window), head=True)

    return kernel


def _extreme_rows(series: Series, family: str, largest: bool) -> dict[int, Tensor]:
    """Return the row `[D, n]` float32 of each window's extreme: the first NaN, else the first tie.

    An int64 key has the value's bits, ordered like integers, in its upper half and the row
    number counted from the end in its lower half. The maximum of the keys is the extreme and,
    among ties, the earliest row.
    """
    block, values = series.block, series.numbers
    values = values if largest else -values
    if values.dtype == torch.float64:
        return _extreme_rows_float64(series, values, series.windows(family))
    bits = (values + 0.0).view(torch.int32)  # adding 0.0 turns -0 into 0
    bits = bits ^ ((bits >> 31) & _HIGHEST)
    if series.rows.has_missing:
        bits = bits.masked_fill_(values.isnan(), _HIGHEST)
        if not block.is_full:
            bits.masked_fill_(~block.is_stored, _LOWEST)
    from_end = block.num_rows - block.rows.to(torch.int64)
    keys = (bits.to(torch.int64) << 32) | from_end
    largest_keys = rolling_extremes(keys, series.windows(family), largest=True)
    return {
        w: block.num_rows - (key & 0xFFFFFFFF).to(torch.float32) for w, key in largest_keys.items()
    }


def _extreme_rows_float64(
    series: Series, values: Tensor, windows: tuple[int, ...]
) -> dict[int, Tensor]:
    """Do the same for float64 values, whose bits leave no room for the row number."""
    block = series.block
    lowest, highest = torch.finfo(torch.float64).min, float("inf")
    values = torch.nan_to_num(values, nan=highest, posinf=highest)
    values = values.masked_fill(~block.is_stored, lowest)
    rows = block.rows.expand_as(values).to(torch.float32).contiguous()
    results = {1: (values, rows)}
    for link in window_chain(windows, overlap=True):
        shift = link.shift
        (new, new_row), (old, old_row) = results[link.newer], results[link.older]
        older = old[:-shift] >= new[shift:]
        best, row = new.clone(), new_row.clone()
        best[shift:] = torch.where(older, old[:-shift], new[shift:])
        row[shift:] = torch.where(older, old_row[:-shift], new_row[shift:])
        results[link.window] = (best, row)
    return {w: results[w][1] for w in windows}


def _rank(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    margin = series.compute_windows("rank", lambda: _rank_margins(series))[window]
    n = series.rows.count(window)
    rank = (margin + (n + 1).to(margin.dtype)).mul_((0.5 / n).to(margin.dtype))
    return executor.block.mask_outside_span(series.rows.mask_missing(rank.to(step.dtype)))


def _rank_margins(series: Series) -> dict[int, Tensor]:
    """Count the values in each window that are smaller than today's, minus those that are larger.

    With n values, the average rank is (margin + n + 1) / 2. NaN is neither smaller nor larger.
    """
    values, windows = series.numbers, series.windows("rank")
    margins, results = torch.zeros_like(values), {}
    buffer = torch.empty_like(values)
    for lag in range(1, max(windows) + 1):
        if lag in windows:
            results[lag] = margins.clone()
        if lag == max(windows):
            break
        signs = torch.sub(values[lag:], values[:-lag], out=buffer[lag:]).sign_()
        margins[lag:] += signs.nan_to_num_(nan=0.0) if series.rows.has_missing else signs
    return results


KERNELS: dict[str, Kernel] = {
    "Sum": _sum,
    "Mean": _mean,
    "Var": _variance,
    "Std": _standard_deviation,
    "Count": _count,
    "Skew": _skewness,
    "Kurt": _kurtosis,
    "Slope": _slope,
    "Resi": _residual,
    "Rsquare": _rsquare,
    "WMA": _wma,
    "Cov": _covariance,
    "Corr": _correlation,
    "Max": _extreme_kernel(largest=True),
    "Min": _extreme_kernel(largest=False),
    "IdxMax": _position_kernel(largest=True),
    "IdxMin": _position_kernel(largest=False),
    "Rank": _rank,
}
