"""DLinear: linear layers over the trend and the remainder of each feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class DLinear(Network):
    """Linear layers over time for each feature's trend (a moving average) and remainder, then a
    linear layer over the features.

    Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023. Adapted:
    the paper forecasts each series from its own past; here a linear layer combines the forecasts
    of the features into one score. With `individual`, each feature has its own linear layers.
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
            raise ValueError(f"kernel_size is {kernel_size}; expected at least 1.")
        self.kernel_size = kernel_size
        num_lines, limit = d_feat if individual else 1, step_len**-0.5
        self.trend = nn.Parameter(torch.empty(num_lines, step_len).uniform_(-limit, limit))
        self.rest = nn.Parameter(torch.empty(num_lines, step_len).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.zeros(num_lines))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_feat, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        x = x.transpose(1, 2)  # [B, F, T]
        trend = moving_average(x, self.kernel_size)
        forecast = (trend * self.trend + (x - trend) * self.rest).sum(2) + self.bias  # [B, F]
        return self.scores(self.head(self.dropout(forecast)))


def moving_average(x: Tensor, kernel_size: int) -> Tensor:
    """Return the centered moving average over the last axis of `x [B, F, T]`.

    The window is padded by repeating its first and last values, so the length stays T.
    """
    before = (kernel_size - 1) // 2
    padded = F.pad(x, (before, kernel_size - 1 - before), mode="replicate")
    return F.avg_pool1d(padded, kernel_size, stride=1)
