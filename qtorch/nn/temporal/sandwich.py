"""Sandwich: alternating convolutions and recurrent layers."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.temporal.krnn import KRNNEncoder


class Sandwich(Network):
    """Two stacked `KRNN` encoders (convolution, recurrence, convolution, recurrence) and a linear
    head on the state of the newest step.

    From Microsoft's FOST, without a paper. Corresponds to Qlib's pytorch_sandwich.py. The
    differences are those of `KRNN`.
    """

    def __init__(
        self,
        d_feat: int = 6,
        cnn_dim_1: int = 64,
        cnn_dim_2: int = 32,
        cnn_kernel_size: int = 3,
        rnn_dim_1: int = 16,
        rnn_dim_2: int = 8,
        rnn_dups: int = 3,
        rnn_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        sizes = (rnn_dups, rnn_layers, dropout)
        self.first_encoder = KRNNEncoder(d_feat, cnn_dim_1, cnn_kernel_size, rnn_dim_1, *sizes)
        self.second_encoder = KRNNEncoder(rnn_dim_1, cnn_dim_2, cnn_kernel_size, rnn_dim_2, *sizes)
        self.out_fc = nn.Linear(rnn_dim_2, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        steps = self.second_encoder(self.first_encoder(x))  # [B, T, H]
        return self.scores(self.out_fc(steps[:, -1]))
