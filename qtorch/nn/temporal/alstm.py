"""ALSTM: a recurrent network with attention over its own states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers


class ALSTM(Network):
    """Recurrent layers over embedded steps, scored from their last state concatenated with the
    attention-weighted mean of all states.

    Qin et al., "A Dual-Stage Attention-Based Recurrent Neural Network for Time Series
    Prediction", 2017 (its temporal attention), as used by Feng et al., "Enhancing Stock Movement
    Prediction with Adversarial Training", 2019. Corresponds to Qlib's pytorch_alstm.py and
    pytorch_alstm_ts.py. Differences: `num_outputs`; layers have descriptive names; the window is
    `[B, T, F]`, not flat.
    """

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_type: str = "GRU",
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if hidden_size < 2:
            raise ValueError(
                f"hidden_size is {hidden_size}; expected at least 2 (attention uses half)."
            )
        self.embed = nn.Linear(d_feat, hidden_size)
        self.rnn = recurrent_layers(rnn_type, hidden_size, hidden_size, num_layers, dropout)
        self.attend = nn.Linear(hidden_size, hidden_size // 2)
        self.dropout = nn.Dropout(dropout)
        self.relevance = nn.Linear(hidden_size // 2, 1, bias=False)
        self.fc_out = nn.Linear(2 * hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states, _ = self.rnn(torch.tanh(self.embed(x)))  # [B, T, H]
        weight = self.relevance(torch.tanh(self.dropout(self.attend(states))))  # [B, T, 1]
        mean = (states * weight.softmax(1)).sum(1)  # [B, H]
        return self.scores(self.fc_out(torch.cat((states[:, -1], mean), -1)))
