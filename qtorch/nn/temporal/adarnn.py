"""ADARNN: a GRU trained so that its hidden states are distributed alike in different periods."""

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
    """Stacked GRU that exposes the hidden states of every layer.

    Each layer is a separate module, because training compares the states of all layers between
    domains (periods of time); see `qtorch.model.ADARNNModule`.

    Du et al., "AdaRNN: Adaptive Learning and Forecasting of Time Series", CIKM 2021. Corresponds
    to Qlib's pytorch_adarnn.py, with the same layer names. Differences: `dropout` is applied
    between the layers (Qlib passes it to single-layer GRUs, which ignore it); the gates are not
    part of the network, because only training needs them; the bottleneck, which Qlib never
    enables, is left out.
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
            raise ValueError(f"num_layers is {num_layers}; expected at least 1.")
        widths = [d_feat] + [hidden_size] * (num_layers - 1)
        self.features = nn.ModuleList([GRULayers(width, hidden_size) for width in widths])
        self.dropout = nn.Dropout(dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def states(self, x: Tensor) -> list[Tensor]:
        """Return the hidden states `[B, T, H]` of each layer for `x [B, T, F]`."""
        layer_states: list[Tensor] = []
        for layer in self.features:
            layer_input = self.dropout(layer_states[-1]) if layer_states else x
            states, _ = layer(layer_input)
            layer_states.append(states)
        return layer_states

    def score_states(self, states: Sequence[Tensor]) -> Tensor:
        """Return the scores `[B]` or `[B, Q]` computed from the hidden states of the layers."""
        return self.scores(self.fc_out(states[-1][:, -1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        return self.score_states(self.states(x))


class StepGates(nn.Module):
    """Weights of the steps of each layer in the distance between the states of two domains.

    They are learned in the first epochs of a training (`pre_epoch` of ADARNNModule). The names of
    the layers and the initialization are Qlib's.
    """

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
        """Return step weights `[layers, T]`, which sum to one for each layer.

        `source` and `target` hold the states `[B, T, H]` of each layer for two domains; sample b of
        one is paired with sample b of the other.
        """
        layer_weights = []
        for gate, norm, first, second in zip(self.gate, self.bn_lst, source, target, strict=True):
            pairs = torch.cat((first, second), -1).flatten(1)  # [B, T * 2H]
            layer_weights.append(torch.sigmoid(norm(gate(pairs))).mean(0).softmax(0))
        return torch.stack(layer_weights)


def step_distances(kind: str, source: Tensor, target: Tensor) -> Tensor:
    """Return the distance `[..., T]` at each step between two sets of states `[..., B, T, H]`.

    `kind` is one of DISTANCES. "cosine": one minus the cosine of their means; "mmd": the squared
    distance of their means; "coral": the squared distance of their covariances, divided by 4 H^2.
    """
    if kind == "coral":
        # The mean divides by H^2 already.
        return (_covariance(source) - _covariance(target)).square().mean((-2, -1)) / 4
    first, second = source.mean(-3), target.mean(-3)  # [..., T, H]
    if kind == "mmd":
        return (first - second).square().sum(-1)
    return 1 - F.cosine_similarity(first, second, dim=-1)


def _covariance(states: Tensor) -> Tensor:
    """Return the covariance `[..., T, H, H]` over the batch of `[..., B, T, H]` at each step."""
    deviations = states - states.mean(-3, keepdim=True)
    products = torch.einsum("...bth,...btk->...thk", deviations, deviations)
    return products / max(states.shape[-3] - 1, 1)
