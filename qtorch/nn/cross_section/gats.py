"""GATs: recurrent states of instruments, and attention between the instruments of a day."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section.layers import masked_softmax, newest_states
from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers


class GATs(Network):
    """Recurrent state of each instrument, plus learned attention over the day's instruments.

    Velickovic et al., "Graph Attention Networks", ICLR 2018, on the complete graph of a day.
    Corresponds to Qlib's pytorch_gats.py and pytorch_gats_ts.py, with the same layer names, so
    that the recurrent weights can be taken from a trained LSTM or GRU. Differences: a batch is
    whole days and padding is masked (Qlib's `_ts` splits windows that are sorted by instrument as
    if they were sorted by date, so its "days" are stretches of one instrument); the logits of all
    pairs are computed as a sum of two terms instead of from `[N * N, 2 H]` concatenated pairs;
    `num_outputs`; a day with one instrument keeps its shape.
    """

    cross_section = True

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        base_model: str = "GRU",
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.rnn = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.transformation = nn.Linear(hidden_size, hidden_size)
        self.a = nn.Parameter(torch.randn(2 * hidden_size, 1))
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `x [G, N, T, F]`, `mask [G, N]` to scores `[G, N]` or `[G, N, Q]`."""
        state = newest_states(self.rnn, x)  # [G, N, H]
        key, query = (self.transformation(state) @ part for part in self.a.chunk(2))  # [G, N, 1]
        logits = F.leaky_relu(query + key.transpose(-1, -2))  # [G, N, N]
        state = state + masked_softmax(logits, mask[:, None]).to(state.dtype) @ state
        return self.scores(self.fc_out(F.leaky_relu(self.fc(state))))
