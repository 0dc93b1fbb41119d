"""GRU: the LSTM's lighter sister."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers


class GRU(Network):
    """Stacked GRU whose last state gives the score.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014. Answers to
    Qlib's pytorch_gru.py and pytorch_gru_ts.py; the layers have the same names. Differences as
    in `LSTM`.
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.rnn = GRULayers(d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))
