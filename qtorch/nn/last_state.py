"""Recurrent layers over the window and a head on their last state: what LSTM and GRU share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers, LSTMLayers


class LastState(Network, ABC):
    """Reads the window from its oldest step to its newest; the last state gives the score."""

    @property
    @abstractmethod
    def layers(self) -> type[LSTMLayers] | type[GRULayers]:
        """Which recurrent layers a network of this family has."""

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.rnn = self.layers(d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))
