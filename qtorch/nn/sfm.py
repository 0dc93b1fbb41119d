"""SFM: a recurrent memory that keeps each state by frequency."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class SFM(Network):
    """State frequency memory: the memory of each of H states is a spectrum of `freq_dim`
    frequencies, which decays by state and by frequency; its amplitudes give the next state.

    Zhang, Aggarwal and Qi, "Stock Price Prediction via Discovering Multi-Frequency Trading
    Patterns", KDD 2017. Answers to Qlib's pytorch_sfm.py; `gates` and `recur` hold its W and U
    side by side, in the order of `_parts`. Differences: `dropout_W` (on the features) and
    `dropout_U` (on the state) act, with one draw for all steps of a window, where Qlib takes
    them and does nothing; the waves are in the precision of the weights, Qlib's in double; the
    projection is made of the last state alone, whose others nobody reads; `num_outputs`.
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
        # The input gate, how the states are forgotten, the candidate, the output gate, and how
        # the frequencies are forgotten.
        self._parts = [hidden_size, hidden_size, hidden_size, hidden_size, freq_dim]
        self.gates = nn.Linear(d_feat, sum(self._parts))
        self.recur = nn.Linear(hidden_size, sum(self._parts), bias=False)
        self.amplitude = nn.Parameter(nn.init.orthogonal_(torch.empty(freq_dim, 1)))
        self.amplitude_bias = nn.Parameter(torch.zeros(hidden_size))
        self.project = nn.Linear(hidden_size, output_dim)
        self.fc_out = nn.Linear(output_dim, num_outputs)
        self.register_buffer("waves", torch.arange(freq_dim) / freq_dim, persistent=False)
        self._begin()

    def _begin(self) -> None:
        """Each part by itself, as the paper's authors do; what is forgotten begins as nothing."""
        for layer, begin in (
            (self.gates, nn.init.xavier_uniform_),
            (self.recur, nn.init.orthogonal_),
        ):
            for part in torch.split(layer.weight.data, self._parts):
                begin(part)
        hidden = self._parts[0]
        bias = self.gates.bias.data.zero_()
        bias[hidden : 2 * hidden] = 1
        bias[4 * hidden :] = 1
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        hidden, frequencies = self._parts[0], self._parts[-1]
        given = self.gates(x * _kept(x[:, :1], self.dropout_W, self.training))  # [B, T, 4H + K]
        count = x.shape[0]  # len(x) is a constant to a program that is exported
        state = given.new_zeros(count, hidden)  # [B, H]
        kept = _kept(state, self.dropout_U, self.training)
        real = imaginary = given.new_zeros(count, hidden, frequencies)  # [B, H, K]
        for step in range(x.shape[1]):
            parts = given[:, step] + self.recur(state * kept)
            i, slow, c, o, fast = parts.split(self._parts, -1)
            forget = F.hardsigmoid(slow)[:, :, None] * F.hardsigmoid(fast)[:, None]  # [B, H, K]
            new = (F.hardsigmoid(i) * torch.tanh(c))[:, :, None]  # [B, H, 1]
            angle = 2 * math.pi * (step + 1) * self.waves  # [K]
            real = forget * real + new * torch.cos(angle)
            imaginary = forget * imaginary + new * torch.sin(angle)
            power = real.square() + imaginary.square()
            spectrum = (power @ self.amplitude)[..., 0] + self.amplitude_bias  # [B, H]
            state = F.hardsigmoid(o) * torch.tanh(spectrum)
        return self.scores(self.fc_out(self.project(state)))


def _kept(like: Tensor, share: float, training: bool) -> Tensor:
    """What dropout leaves of ones in the form of `like`."""
    return F.dropout(torch.ones_like(like), share, training)
