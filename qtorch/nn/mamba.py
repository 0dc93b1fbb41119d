"""A selective state-space model (Mamba), scanned step by step in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class SelectiveSSM(nn.Module):
    """A block over `x [B, T, H]`: short causal convolution, selective scan, gate.

    The state `[B, E, K]` decays and takes in each step by amounts that the step itself decides
    (its step size, what goes in, what is read out).
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
        # Decay rates 1..K for each channel; step sizes between 0.001 and 0.1 at first.
        rates = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(inner, 1)
        self.log_rate = nn.Parameter(rates.log())
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        size = torch.exp(torch.rand(inner) * math.log(100.0) + math.log(0.001))
        with torch.no_grad():  # the inverse of softplus
            self.dt_proj.bias.copy_(size + torch.log(-torch.expm1(-size)))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        inner, gate = self.in_proj(self.norm(x)).chunk(2, -1)  # [B, T, E] each
        inner = F.silu(self.conv(inner.transpose(1, 2))[..., :steps].transpose(1, 2))
        sizes, entry, exit = self.x_proj(inner).split((self.rank, self.d_state, self.d_state), -1)
        delta = F.softplus(self.dt_proj(sizes))  # [B, T, E]
        decay = torch.exp(-delta[..., None] * self.log_rate.exp())  # [B, T, E, K]
        taken = (delta * inner)[..., None] * entry[:, :, None]  # [B, T, E, K]
        state, read = torch.zeros_like(taken[:, 0]), []
        for t in range(steps):
            state = decay[:, t] * state + taken[:, t]
            read.append((state * exit[:, t, None]).sum(-1))  # [B, E]
        found = torch.stack(read, 1) + inner * self.skip
        given: Tensor = x + self.out_proj(found * F.silu(gate))
        return given


class Mamba(Network):
    """Selective state-space blocks over the window; the newest step's state gives the score.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. The
    recurrence is a loop over the steps, for windows are short; no kernel of its own.
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
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states = self.blocks(self.embed(x))
        return self.scores(self.head(self.dropout(self.norm(states[:, -1]))))
