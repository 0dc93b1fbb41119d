"""KRNN: the mean of several parallel recurrent networks over convolved steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers


class KRNN(Network):
    """Convolution over time, then `rnn_dups` small recurrent networks whose mean last state is
    scored. The mean varies less than a single network.

    From Microsoft's FOST, without a paper. Corresponds to Qlib's pytorch_krnn.py. Differences:
    `d_feat` instead of `fea_dim`; Qlib reads the flat window as if it were ordered step by step,
    although Alpha360 orders it feature by feature, so that its convolution mixes time and
    features; an even `cnn_kernel_size` is an error (in Qlib it drops a step); `num_outputs`; a
    batch with one sample keeps its shape.
    """

    def __init__(
        self,
        d_feat: int = 6,
        cnn_dim: int = 64,
        cnn_kernel_size: int = 3,
        rnn_dim: int = 64,
        rnn_dups: int = 3,
        rnn_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.encoder = KRNNEncoder(
            d_feat, cnn_dim, cnn_kernel_size, rnn_dim, rnn_dups, rnn_layers, dropout
        )
        self.out_fc = nn.Linear(rnn_dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        return self.scores(self.out_fc(self.encoder(x)[:, -1]))


class KRNNEncoder(nn.Module):
    """A convolution over time, then the mean of `rnn_dups` GRUs: `x [B, T, F]` to `[B, T, H]`.

    Raises ValueError for an even `cnn_kernel_size`, which has no middle step.
    """

    def __init__(
        self,
        d_feat: int,
        cnn_dim: int,
        cnn_kernel_size: int,
        rnn_dim: int,
        rnn_dups: int,
        rnn_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if cnn_kernel_size % 2 == 0:
            raise ValueError(f"cnn_kernel_size is {cnn_kernel_size}; expected an odd number.")
        if rnn_dups < 1:
            raise ValueError(f"rnn_dups is {rnn_dups}; expected 1 or more.")
        self.conv = nn.Conv1d(d_feat, cnn_dim, cnn_kernel_size, padding=cnn_kernel_size // 2)
        self.rnns = nn.ModuleList(
            GRULayers(cnn_dim, rnn_dim, rnn_layers, dropout) for _ in range(rnn_dups)
        )

    def forward(self, x: Tensor) -> Tensor:
        steps = self.conv(x.transpose(1, 2)).transpose(1, 2)  # [B, T, C]
        return torch.stack([rnn(steps)[0] for rnn in self.rnns]).mean(0)
