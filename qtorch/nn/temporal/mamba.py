"""Mamba: a selective state-space model, scanned step by step in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtorch.nn.network import Network
from qtorch.nn.stacked import is_stacked


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
    dtype = torch.promote_types(decay.dtype, increment.dtype)
    decay, increment = decay.to(dtype), increment.to(dtype)
    if not is_stacked():
        return _Scan.apply(decay, increment)  # type: ignore[no-untyped-call]  # untyped in torch
    # Functions that write into given memory cannot be batched over members.
    states = [increment[:, 0]]  # the first state is the first increment
    for t in range(1, increment.shape[1]):
        states.append(decay[:, t] * states[-1] + increment[:, t])
    return torch.stack(states, 1)


class _Scan(torch.autograd.Function):
    """The scan with one operation for each step, forward and backward."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, increment: Tensor) -> Tensor:
        states = increment.clone()
        for t in range(1, increment.shape[1]):
            states[:, t].addcmul_(decay[:, t], states[:, t - 1])
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        # Each state's gradient includes what it adds to later states.
        gradient = gradient.clone()
        for t in reversed(range(1, gradient.shape[1])):
            gradient[:, t - 1].addcmul_(decay[:, t], gradient[:, t])
        decay_gradient = torch.zeros_like(decay)
        torch.mul(gradient[:, 1:], states[:, :-1], out=decay_gradient[:, 1:])
        return decay_gradient, gradient
