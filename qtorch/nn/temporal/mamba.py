"""Mamba: a selective state-space model, scanned step by step in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class Mamba(Network):
    """Selective state-space blocks over the window and a linear head on the newest step.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. The
    recurrence is a Python loop over the steps instead of a custom kernel, because windows are
    short.
    """

    def __init__(
        self,
        d_feat: int = 20,
        d_model: int = 32,
        num_layers: int = 2,
        d_state: int = 8,
        d_conv: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.embed = nn.Linear(d_feat, d_model)
        self.blocks = nn.Sequential(
            *(SelectiveSSM(d_model, d_state, d_conv, expand) for _ in range(num_layers))
        )
        self.norm = nn.RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states = self.blocks(self.embed(x))
        return self.scores(self.head(self.dropout(self.norm(states[:, -1]))))


class SelectiveSSM(nn.Module):
    """A residual block over `x [B, T, H]`: short causal convolution, selective scan, gate.

    The step size and the input and output matrices of the state `[B, E, K]` are computed from
    each step's input (E = `expand * d_model` channels, K = `d_state`).
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int) -> None:
        super().__init__()
        inner, rank = expand * d_model, max(1, math.ceil(d_model / 16))
        self.d_state, self.rank = d_state, rank
        self.norm = nn.RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        # Initial values: decay rates 1..K for each channel, step sizes between 0.001 and 0.1.
        rates = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(inner, 1)
        self.log_rate = nn.Parameter(rates.log())
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        size = torch.exp(torch.rand(inner) * math.log(100.0) + math.log(0.001))
        with torch.no_grad():  # inverse of softplus
            self.dt_proj.bias.copy_(size + torch.log(-torch.expm1(-size)))

    def forward(self, x: Tensor) -> Tensor:
        num_steps = x.shape[1]
        inner, gate = self.in_proj(self.norm(x)).chunk(2, -1)  # [B, T, E] each
        inner = F.silu(self.conv(inner.transpose(1, 2))[..., :num_steps].transpose(1, 2))
        sizes, input_matrix, output_matrix = self.x_proj(inner).split(
            (self.rank, self.d_state, self.d_state), -1
        )
        delta = F.softplus(self.dt_proj(sizes))  # [B, T, E]
        decay = torch.exp(-delta[..., None] * self.log_rate.exp())  # [B, T, E, K]
        increment = (delta * inner)[..., None] * input_matrix[:, :, None]  # [B, T, E, K]
        states = scan(decay, increment)
        readout = (states * output_matrix[:, :, None]).sum(-1) + inner * self.skip  # [B, T, E]
        return x + self.out_proj(readout * F.silu(gate))


def scan(decay: Tensor, increment: Tensor) -> Tensor:
    """Return all states `[B, T, E, K]` of state[t] = decay[t] * state[t - 1] + increment[t]."""
    # The first state is the first increment. unbind's gradient is one operation for all steps.
    state, *increments = increment.unbind(1)
    states = [state]
    for step_decay, step_increment in zip(decay.unbind(1)[1:], increments, strict=True):
        state = step_decay * state + step_increment
        states.append(state)
    return torch.stack(states, 1)
