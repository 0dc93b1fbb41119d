"""Base class of LSTM and GRU: recurrent layers with a linear head on the last state."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers, LSTMLayers


class LastState(Network, ABC):
    """Recurrent layers over the window, oldest step first, and a linear head on the last state."""

    @property
    @abstractmethod
    def layers(self) -> type[LSTMLayers] | type[GRULayers]:
        """The class of the recurrent layers."""

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
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))
