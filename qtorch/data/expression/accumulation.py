"""Rolling operators beyond Qlib's language: DecayLinear, Product, ArgMax, ArgMin."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.executor import Executor, Kernel
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series, window_chain


def _decay_linear(executor: Executor, step: Step) -> Tensor:
    """Compute the mean of a window's values with weights 1..L over its L rows, today's the largest.

    The weights of missing values are left out of their sum.
    """
    series, window = executor.get_series(step), executor.get_window(step)
    block, rows = executor.block, series.rows
    row_before_window = block.rows - block.window_lengths(window)
    total = torch.addcmul(
        series.sum("position", window),
        series.sum("sum", window).to(torch.float64),
        row_before_window,
        value=-1,
    )
    total.div_((rows.mean_row(window) - row_before_window) * rows.count(window))
    return block.mask_outside_span(rows.mask_empty(total.to(step.dtype), window))


def _product(executor: Executor, step: Step) -> Tensor:
    series, window = executor.get_series(step), executor.get_window(step)
    products = series.compute_windows("factor", lambda: _rolling_products(series))
    product = products[window].to(step.dtype, copy=True)
    return executor.block.mask_outside_span(series.rows.mask_empty(product, window))


def _rolling_products(series: Series) -> dict[int, Tensor]:
    """Compute rolling products `[D, n]` by window, clipped at the first row; NaN counts as 1."""
    factors = series.values_or_zero.to(torch.float64)
    factors = torch.where(series.rows.valid > 0, factors, 1.0)
    results = {1: factors}
    windows = series.windows("factor")
    for link in window_chain(windows):
        product = results[link.newer].clone()
        product[link.shift :] *= results[link.older][: -link.shift]
        results[link.window] = product
    return {w: results[w] for w in windows}


def _argument_kernel(sign: float) -> Kernel:
    """Build ArgMax (sign 1) or ArgMin (sign -1)."""

    def kernel(executor: Executor, step: Step) -> Tensor:
        series, window = executor.get_series(step), executor.get_window(step)
        block, rows = executor.block, series.rows
        values = torch.nan_to_num(series.numbers * sign, nan=-torch.inf)
        best, lags = values.clone(), torch.zeros_like(values)
        for lag in range(1, window):
            older, newest = values[:-lag], best[lag:]
            is_better = older >= newest
            newest.copy_(torch.where(is_better, older, newest))
            lags[lag:].masked_fill_(is_better, lag)
        position = block.window_lengths(window).to(lags.dtype) - lags
        return block.mask_outside_span(rows.mask_empty(position.to(step.dtype), window))

    return kernel


KERNELS: dict[str, Kernel] = {
    "DecayLinear": _decay_linear,
    "Product": _product,
    "ArgMax": _argument_kernel(1.0),
    "ArgMin": _argument_kernel(-1.0),
}
