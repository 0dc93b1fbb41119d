"""LSTM: a recurrent network that reads the window from its oldest step to its newest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network


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
        between = dropout if num_layers > 1 else 0.0
        self.rnn = nn.LSTM(d_feat, hidden_size, num_layers, batch_first=True, dropout=between)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # oneDNN has no half-precision LSTM for many CPUs and raises where it has none.
            with torch.autocast("cpu", enabled=False):
                states, _ = self.rnn(x.float())  # [B, T, H]
        else:
            states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))
