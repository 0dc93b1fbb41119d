"""SFM: a recurrent network whose memory is decomposed by frequency."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class SFM(Network):
    """State frequency memory: each of H states has a memory of `freq_dim` frequencies.

    The memory decays with a forget gate per state and one per frequency. The next hidden state is
    computed from its amplitudes.

    Zhang, Aggarwal and Qi, "Stock Price Prediction via Discovering Multi-Frequency Trading
    Patterns", KDD 2017. Corresponds to Qlib's pytorch_sfm.py; `gates` and `recur` hold its W and U
    matrices concatenated in the order of `_part_sizes`. Differences: `dropout_W` (on the features)
    and `dropout_U` (on the state) are applied, with one mask for all steps of a window, while Qlib
    accepts and ignores them; the waves have the precision of the weights (double in Qlib); only
    the last state is projected, because the others are not used; `num_outputs`.
    """

    waves: Tensor

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        output_dim: int = 1,
        freq_dim: int = 10,
        dropout_W: float = 0.0,
        dropout_U: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.dropout_W, self.dropout_U = dropout_W, dropout_U
        # Input gate, forget gate of the states, candidate, output gate, forget gate of the
        # frequencies.
        self._part_sizes = [hidden_size, hidden_size, hidden_size, hidden_size, freq_dim]
        self.gates = nn.Linear(d_feat, sum(self._part_sizes))
        self.recur = nn.Linear(hidden_size, sum(self._part_sizes), bias=False)
        self.amplitude = nn.Parameter(nn.init.orthogonal_(torch.empty(freq_dim, 1)))
        self.amplitude_bias = nn.Parameter(torch.zeros(hidden_size))
        self.project = nn.Linear(hidden_size, output_dim)
        self.fc_out = nn.Linear(output_dim, num_outputs)
        self.register_buffer("waves", torch.arange(freq_dim) / freq_dim, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialize each gate separately, as the authors do, with forget gate biases of one."""
        for layer, init in (
            (self.gates, nn.init.xavier_uniform_),
            (self.recur, nn.init.orthogonal_),
        ):
            for part in torch.split(layer.weight.data, self._part_sizes):
                init(part)
        hidden = self._part_sizes[0]
        bias = self.gates.bias.data.zero_()
        bias[hidden : 2 * hidden] = 1
        bias[4 * hidden :] = 1
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        hidden, frequencies = self._part_sizes[0], self._part_sizes[-1]
        # Input part of all gates for all steps, [B, T, 4H + K].
        inputs = self.gates(x * _dropout_mask(x[:, :1], self.dropout_W, self.training))
        count = x.shape[0]  # torch.export would treat len(x) as a constant
        state = inputs.new_zeros(count, hidden)  # [B, H]
        state_mask = _dropout_mask(state, self.dropout_U, self.training)
        real = imaginary = inputs.new_zeros(count, hidden, frequencies)  # [B, H, K]
        for step in range(x.shape[1]):
            parts = inputs[:, step] + self.recur(state * state_mask)  # [B, 4H + K]
            i, state_gate, c, o, frequency_gate = parts.split(self._part_sizes, -1)
            forget = F.hardsigmoid(state_gate)[:, :, None] * F.hardsigmoid(frequency_gate)[:, None]
            new = (F.hardsigmoid(i) * torch.tanh(c))[:, :, None]  # [B, H, 1]
            angle = 2 * math.pi * (step + 1) * self.waves  # [K]
            real = forget * real + new * torch.cos(angle)
            imaginary = forget * imaginary + new * torch.sin(angle)
            power = real.square() + imaginary.square()
            spectrum = (power @ self.amplitude)[..., 0] + self.amplitude_bias  # [B, H]
            state = F.hardsigmoid(o) * torch.tanh(spectrum)
        return self.scores(self.fc_out(self.project(state)))


def _dropout_mask(reference: Tensor, p: float, training: bool) -> Tensor:
    """Return ones after dropout, with the shape of `reference`."""
    return F.dropout(torch.ones_like(reference), p, training)
