"""TSMixer: multilayer perceptrons over time and over features in turn."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class MixerBlock(nn.Module):
    """Mixes `x [B, T, F]` along the steps, then along the features, each with a residual."""

    def __init__(self, step_len: int, d_feat: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.time_norm = nn.LayerNorm((step_len, d_feat))
        self.time = nn.Linear(step_len, step_len)
        self.feature_norm = nn.LayerNorm((step_len, d_feat))
        self.wide = nn.Linear(d_feat, hidden_size)
        self.narrow = nn.Linear(hidden_size, d_feat)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.relu(self.time(self.time_norm(x).transpose(1, 2))).transpose(1, 2)
        x = x + self.dropout(mixed)
        hidden = self.dropout(F.relu(self.wide(self.feature_norm(x))))
        found: Tensor = x + self.dropout(self.narrow(hidden))
        return found


class TSMixer(Network):
    """Mixer blocks, a projection of the steps to one, a linear layer over the features.

    Chen et al., "TSMixer: An All-MLP Architecture for Time Series Forecasting", TMLR 2023.
    Adapted: the temporal projection ends in one step, and the features in a score. The norms are
    over steps and features of a sample (the paper takes a batch's; its code offers both), so
    that a score does not depend on what else is in the batch.
    """

    def __init__(
        self,
        d_feat: int = 20,
        step_len: int = 20,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.1,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.blocks = nn.Sequential(
            *(MixerBlock(step_len, d_feat, hidden_size, dropout) for _ in range(num_layers))
        )
        self.project = nn.Linear(step_len, 1)
        self.head = nn.Linear(d_feat, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        x = self.blocks(x)
        last = self.project(x.transpose(1, 2))[..., 0]  # [B, F]
        return self.scores(self.head(last))
