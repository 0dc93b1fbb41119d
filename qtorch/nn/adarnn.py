"""ADARNN: a GRU whose states are to be alike in all periods of the past."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.mlp import BatchNorm
from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers

DISTANCES = ("cosine", "mmd", "coral")


class ADARNN(Network):
    """GRU layers, each a module of its own, so that the states of all of them can be compared.

    Du et al., "AdaRNN: Adaptive Learning and Forecasting of Time Series", CIKM 2021. Answers to
    Qlib's pytorch_adarnn.py; the layers have the same names. `qtorch.model.ADARNNModule` trains
    it over domains of time. Differences: `dropout` acts between the layers (Qlib gives it to
    layers of one, where it does nothing); the gates, which only training needs, are no part of
    the network; the bottleneck, which Qlib never turns on, is left out.
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        dropout: float = 0.0,
        num_layers: int = 2,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; there must be one at least.")
        widths = [d_feat] + [hidden_size] * (num_layers - 1)
        self.features = nn.ModuleList([GRULayers(width, hidden_size) for width in widths])
        self.dropout = nn.Dropout(dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def states(self, x: Tensor) -> list[Tensor]:
        """The states `[B, T, H]` of each layer for `x [B, T, F]`."""
        found: list[Tensor] = []
        for layer in self.features:
            found.append(layer(self.dropout(found[-1]) if found else x)[0])
        return found

    def scored(self, states: Sequence[Tensor]) -> Tensor:
        """The scores `[B]` or `[B, Q]` that the layers' states give."""
        return self.scores(self.fc_out(states[-1][:, -1]))

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        return self.scored(self.states(x))


class StepGates(nn.Module):
    """How much each step of each layer matters where the states of two domains are compared."""

    def __init__(self, num_layers: int, step_len: int, hidden_size: int) -> None:
        super().__init__()
        width = 2 * step_len * hidden_size
        self.gate = nn.ModuleList([nn.Linear(width, step_len) for _ in range(num_layers)])
        self.bn_lst = nn.ModuleList([BatchNorm(step_len) for _ in range(num_layers)])
        for gate in self.gate:
            assert isinstance(gate, nn.Linear)
            nn.init.normal_(gate.weight, 0.0, 0.05)
            nn.init.zeros_(gate.bias)

    def forward(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        """States `[B, T, H]` of each layer, sample against sample, to shares `[layers, T]`."""
        shares = []
        for gate, norm, first, second in zip(self.gate, self.bn_lst, source, target, strict=True):
            both = torch.cat((first, second), -1).flatten(1)  # [B, T * 2H]
            shares.append(torch.sigmoid(norm(gate(both))).mean(0).softmax(0))
        return torch.stack(shares)


def step_distances(kind: str, source: Tensor, target: Tensor) -> Tensor:
    """How far apart two sets of states `[B, T, H]` lie at each step: `[T]`.

    "cosine": one less the cosine of their means; "mmd": the squared distance of their means;
    "coral": that of their covariances, over 4 H^2.
    """
    if kind == "coral":
        return (_covariance(source) - _covariance(target)).square().mean((1, 2)) / 4
    first, second = source.mean(0), target.mean(0)  # [T, H]
    if kind == "mmd":
        return (first - second).square().sum(-1)
    return 1 - F.cosine_similarity(first, second, dim=-1)


def _covariance(states: Tensor) -> Tensor:
    """`[B, T, H]` to `[T, H, H]`."""
    centred = states - states.mean(0)
    return torch.einsum("bth,btk->thk", centred, centred) / max(len(states) - 1, 1)
