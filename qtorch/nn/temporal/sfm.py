"""SFM: a recurrent network whose memory is decomposed by frequency."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import split_uses


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
        steps = x.shape[1]
        # Input part of all gates for all steps, [B, T, 4H + K].
        x = x * _dropout_mask(x[:, :1], self.dropout_W, self.training)
        inputs = F.linear(x, *map(self._move_candidate, (self.gates.weight, self.gates.bias)))
        count = x.shape[0]  # torch.export would treat len(x) as a constant
        state = inputs.new_zeros(count, hidden)  # [B, H]
        state_mask = _dropout_mask(state, self.dropout_U, self.training)
        # Real and imaginary parts in one tensor: half as many operations.
        memory = inputs.new_zeros(count, hidden, 2, frequencies)  # [B, H, 2, K]
        amplitude = self.amplitude.repeat(2, 1)  # of both parts, [2 * K, 1]
        for step_inputs, wave, recur, step_amplitude, bias in zip(
            inputs.unbind(1),  # whose gradient is one operation for all steps
            self._waves(steps),
            split_uses(self._move_candidate(self.recur.weight).t(), steps),
            split_uses(amplitude, steps),
            split_uses(self.amplitude_bias, steps),
            strict=True,
        ):
            masked_state = state if self.dropout_U == 0 else state * state_mask
            parts = torch.addmm(step_inputs, masked_state, recur)  # [B, 4H + K]
            parts, candidate = torch.split(parts, [3 * hidden + frequencies, hidden], -1)
            i, state_gate, o, frequency_gate = torch.split(
                F.hardsigmoid(parts), [hidden, hidden, hidden, frequencies], -1
            )
            candidate = i * torch.tanh(candidate)
            forget = state_gate[:, :, None] * frequency_gate[:, None]  # [B, H, K]
            memory = torch.addcmul(forget[:, :, None] * memory, candidate[..., None, None], wave)
            power = memory.square().flatten(2) @ step_amplitude  # [B, H, 1]
            state = o * torch.tanh(power.squeeze(-1) + bias)
        return self.scores(self.fc_out(self.project(state)))

    def _move_candidate(self, values: Tensor) -> Tensor:
        """Return the weights or biases `[4H + K, ...]` of all parts with the candidate's last."""
        i, state_gate, candidate, o, frequency_gate = torch.split(values, self._part_sizes)
        return torch.cat((i, state_gate, o, frequency_gate, candidate))

    def _waves(self, num_steps: int) -> Iterable[Tensor]:
        """Return cosine and sine of each step and frequency, `[2, K]` for each step."""
        steps = torch.arange(1, num_steps + 1, dtype=torch.float64, device=self.waves.device)
        angles = (2 * math.pi * steps).to(self.waves.dtype)[:, None] * self.waves  # [T, K]
        return torch.stack((torch.cos(angles), torch.sin(angles)), 1).unbind(0)


def _dropout_mask(reference: Tensor, p: float, training: bool) -> Tensor:
    """Return ones after dropout, with the shape of `reference`."""
    return F.dropout(torch.ones_like(reference), p, training)
