"""TCN: causal convolutions over the window with increasing dilation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class TCN(Network):
    """Temporal blocks with doubling dilation and a linear head on the newest step.

    Bai, Kolter and Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent
    Networks for Sequence Modeling", 2018. Corresponds to Qlib's pytorch_tcn.py, pytorch_tcn_ts.py
    and tcn.py; the weights of a block have the same names. Differences: only the start of the
    window is padded (Qlib pads both ends and cuts the last steps off); the convolutions of the
    residual connections have torch's default initialization (Qlib: normal with standard deviation
    0.01, also intended for the causal convolutions, where weight norm undoes it); `num_outputs`; a
    batch with one sample keeps its shape.
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
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states = x.transpose(1, 2)  # [B, F, T]
        for block in self.blocks:
            states = block(states)  # [B, H, T]
        return self.scores(self.linear(states[:, :, -1]))


class TemporalBlock(nn.Module):
    """Two causal convolutions with a residual connection: `x [B, C, T]` to `[B, C', T]`."""

    def __init__(
        self, in_size: int, out_size: int, kernel_size: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv(in_size, out_size, kernel_size, dilation)
        self.conv2 = CausalConv(out_size, out_size, kernel_size, dilation)
        self.downsample = nn.Conv1d(in_size, out_size, 1) if in_size != out_size else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.conv1(x)))
        hidden = self.dropout(torch.relu(self.conv2(hidden)))
        return torch.relu(hidden + self.downsample(x))


class CausalConv(nn.Module):
    """Causal, weight-normalized convolution over time: `x [B, C, T]` to `[B, C', T]`.

    Each output step depends on `kernel_size` input steps, `dilation` apart, up to itself.
    `weight_v` is the direction of the weights and `weight_g` their norm for each output channel
    (Salimans and Kingma, "Weight Normalization", 2016). torch's weight norm is not used, because
    the derived weight that it stores works neither with pickling nor with stacked members.
    """

    def __init__(self, in_size: int, out_size: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        limit = 1 / math.sqrt(in_size * kernel_size)  # as in nn.Conv1d
        self.weight_v = nn.Parameter(torch.empty(out_size, in_size, kernel_size))
        nn.init.uniform_(self.weight_v, -limit, limit)
        self.weight_g = nn.Parameter(self._norm().detach())
        self.bias = nn.Parameter(torch.empty(out_size).uniform_(-limit, limit))
        self.dilation = dilation
        self.padding = (kernel_size - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_v.is_cuda:  # the same in one operation, with a gradient in one operation
            weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        else:
            weight = self.weight_v * (self.weight_g / self._norm())
        return F.conv1d(F.pad(x, (self.padding, 0)), weight, self.bias, dilation=self.dilation)

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
