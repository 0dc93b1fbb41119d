"""Rolling quantiles and medians."""

from __future__ import annotations

import torch
from torch import Tensor

from qtorch.data.expression.machine import Kernel, Machine
from qtorch.data.expression.plan import Step
from qtorch.data.expression.series import Series

_CELLS = 2**23


def _quantile(machine: Machine, step: Step) -> Tensor:
    series, window = machine.series(step), int(step.numbers[0])
    share = float(step.numbers[1]) if step.operator == "Quantile" else 0.5
    shares = machine.plan.shares[step.inputs, window]
    found = series.built(f"quantile{window}", lambda s: _quantiles(s, window, shares))
    return machine.block.seal(found[shares.index(share)].to(step.dtype))


def _quantiles(series: Series, window: int, shares: tuple[float, ...]) -> dict[int, Tensor]:
    """Each share's quantile of a window, by sorting."""
    block, values = series.block, series.numbers
    window = series.effective(window)
    filled = torch.nan_to_num(values, nan=float("inf"))
    out = {k: torch.empty_like(values) for k in range(len(shares))}
    padded = torch.cat([filled.new_full((window - 1, filled.shape[1]), float("inf")), filled])
    n = series.count(window).expand(block.num_rows, block.num_columns)
    step = max(1, _CELLS // max(1, window * block.num_columns))
    for begin in range(0, block.num_rows, step):
        end = min(begin + step, block.num_rows)
        ordered = padded[begin : end + window - 1].unfold(0, window, 1).sort(-1).values
        for k, share in enumerate(shares):
            out[k][begin:end] = pick(ordered, n[begin:end], share)
    return out


def pick(ordered: Tensor, n: Tensor, share: float) -> Tensor:
    """The quantile of the first `n` of the last axis, interpolated; NaN where n is 0."""
    place = share * (n - 1).clamp(min=0)
    low = place.floor().to(torch.int64)
    high = (low + 1).clamp(max=ordered.shape[-1] - 1)
    below = ordered.gather(-1, low[..., None])[..., 0].to(torch.float64)
    above = ordered.gather(-1, high[..., None])[..., 0].to(torch.float64)
    part = place - low
    value = torch.where(part > 0, below + (above - below) * part, below)
    return value.masked_fill(n == 0, float("nan"))


KERNELS: dict[str, Kernel] = {"Quantile": _quantile, "Med": _quantile}
