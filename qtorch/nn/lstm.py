"""LSTM: a recurrent network that reads the window from its oldest step to its newest."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import LSTMLayers


class LSTM(Network):
    """Stacked LSTM whose last state gives the score.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997. Answers to Qlib's
    pytorch_lstm.py and pytorch_lstm_ts.py, which differ only in how they are fed; the layers
    have the same names, so that weights can be copied. Differences: `num_outputs`; a batch of
    one stays a batch; no warning about dropout with a single layer (torch applies none there).
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
        self.rnn = LSTMLayers(d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))
