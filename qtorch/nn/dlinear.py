"""DLinear: a straight line through trend and remainder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


def moving_average(x: Tensor, kernel_size: int) -> Tensor:
    """Centred moving average over the last axis of `x [B, F, T]`, the ends repeated."""
    before = (kernel_size - 1) // 2
    padded = F.pad(x, (before, kernel_size - 1 - before), mode="replicate")
    return F.avg_pool1d(padded, kernel_size, stride=1)


class DLinear(Network):
    """Each feature's trend (a moving average) and remainder through a linear layer over time;
    a linear layer over the features then gives the score.

    Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023. Adapted:
    the paper forecasts every series from itself; here the forecasts of the features are weighed
    to one score. `individual` gives each feature layers of its own.
    """

    def __init__(
        self,
        d_feat: int = 20,
        step_len: int = 20,
        kernel_size: int = 5,
        individual: bool = True,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if kernel_size < 1:
            raise ValueError(f"kernel_size is {kernel_size}; an average needs one step at least.")
        self.kernel_size = kernel_size
        lines, bound = d_feat if individual else 1, step_len**-0.5
        self.trend = nn.Parameter(torch.empty(lines, step_len).uniform_(-bound, bound))
        self.rest = nn.Parameter(torch.empty(lines, step_len).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(lines))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_feat, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        x = x.transpose(1, 2)  # [B, F, T]
        trend = moving_average(x, self.kernel_size)
        level = (trend * self.trend + (x - trend) * self.rest).sum(2) + self.bias  # [B, F]
        return self.scores(self.head(self.dropout(level)))
