"""TSMixer: MLPs that alternate between mixing over time and over features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class TSMixer(Network):
    """Mixer blocks, a linear projection of the steps to one, and a linear head over the features.

    Chen et al., "TSMixer: An All-MLP Architecture for Time Series Forecasting", TMLR 2023.
    Adapted: the temporal projection returns one step, and the features are mapped to a score. Norms
    are computed over the steps and features of a sample, so that a score does not depend on the
    rest of the batch (the paper uses batch norms; its code offers both).
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
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        x = self.blocks(x)
        last = self.project(x.transpose(1, 2))[..., 0]  # [B, F]
        return self.scores(self.head(last))


class MixerBlock(nn.Module):
    """Mix `x [B, T, F]` over the steps, then over the features, each with a residual."""

    def __init__(self, step_len: int, d_feat: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.time_norm = nn.LayerNorm((step_len, d_feat))
        self.time = nn.Linear(step_len, step_len)
        self.feature_norm = nn.LayerNorm((step_len, d_feat))
        self.wide = nn.Linear(d_feat, hidden_size)
        self.narrow = nn.Linear(hidden_size, d_feat)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        update = F.relu(self.time(self.time_norm(x).transpose(1, 2))).transpose(1, 2)
        x = x + self.dropout(update)
        hidden = self.dropout(F.relu(self.wide(self.feature_norm(x))))
        return x + self.dropout(self.narrow(hidden))
