"""TCN: convolutions that look back over ever wider stretches of the window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class CausalConv(nn.Module):
    """Weight-normalised convolution over time: `x [B, C, T]` to `[B, C', T]`, where each step
    sees `kernel_size` steps, `dilation` apart, of which it is the last.

    `weight_v` is the direction of the weights, `weight_g` their length for each output channel
    (Salimans and Kingma, "Weight Normalization", 2016). torch's own wrappers of weight norm hold
    a derived weight that neither pickling nor stacked members bear.
    """

    def __init__(self, in_size: int, out_size: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_size * kernel_size)  # as nn.Conv1d begins
        self.weight_v = nn.Parameter(torch.empty(out_size, in_size, kernel_size))
        nn.init.uniform_(self.weight_v, -bound, bound)
        self.weight_g = nn.Parameter(self._length().detach())
        self.bias = nn.Parameter(torch.empty(out_size).uniform_(-bound, bound))
        self.dilation = dilation
        self.past = (kernel_size - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self._length())
        return F.conv1d(F.pad(x, (self.past, 0)), weight, self.bias, dilation=self.dilation)

    def _length(self) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
        return length


class TemporalBlock(nn.Module):
    """Two causal convolutions beside a shortcut: `x [B, C, T]` to `[B, C', T]`."""

    def __init__(
        self, in_size: int, out_size: int, kernel_size: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv(in_size, out_size, kernel_size, dilation)
        self.conv2 = CausalConv(out_size, out_size, kernel_size, dilation)
        self.downsample = nn.Conv1d(in_size, out_size, 1) if in_size != out_size else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found = self.dropout(torch.relu(self.conv1(x)))
        found = self.dropout(torch.relu(self.conv2(found)))
        return torch.relu(found + self.downsample(x))


class TCN(Network):
    """Temporal blocks, each with twice the dilation of the one before; the newest step's state
    gives the score.

    Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent
    Networks for Sequence Modeling", 2018. Answers to Qlib's pytorch_tcn.py, pytorch_tcn_ts.py
    and tcn.py; a block's weights have the same names. Differences: the padding stands before
    the first step alone, where Qlib pads both sides and cuts the end off; the shortcuts begin as
    torch's convolutions, Qlib's from a normal of 0.01 (which it means for the convolutions too,
    where weight norm undoes it); `num_outputs`; a batch of one stays a batch.
    """

    def __init__(
        self,
        d_feat: int = 6,
        n_chans: int = 128,
        kernel_size: int = 5,
        num_layers: int = 2,
        dropout: float = 0.5,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        for name, value in (("kernel_size", kernel_size), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        self.blocks = nn.ModuleList(
            TemporalBlock(n_chans if k else d_feat, n_chans, kernel_size, 2**k, dropout)
            for k in range(num_layers)
        )
        self.linear = nn.Linear(n_chans, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states = x.transpose(1, 2)  # [B, F, T]
        for block in self.blocks:
            states = block(states)  # [B, H, T]
        return self.scores(self.linear(states[:, :, -1]))
