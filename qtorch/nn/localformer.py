"""Localformer: a Transformer with the neighbourhood of each step convolved in."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers
from qtorch.nn.transformer import PositionalEncoding


class Localformer(Network):
    """Encoder layers that see each step with a convolution of its neighbours added, then a GRU
    whose last state gives the score.

    The idea is Li et al.'s, "Enhancing the Locality and Breaking the Memory Bottleneck of
    Transformer on Time Series Forecasting", 2019; the form is of Qlib's pytorch_localformer.py
    and pytorch_localformer_ts.py, to which this answers; there is no paper of its own.
    Differences: Qlib's weights hold the encoder layer that it copies, too, which nothing uses;
    its copies begin equal, ours each with weights of their own; `dim_feedforward` and
    `num_outputs` can be set.
    """

    def __init__(
        self,
        d_feat: int = 20,
        d_model: int = 64,
        nhead: int = 2,
        num_layers: int = 2,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if d_model % nhead:
            raise ValueError(f"d_model {d_model} is not a multiple of nhead {nhead}.")
        self.feature_layer = nn.Linear(d_feat, d_model)
        self.pos_encoder = PositionalEncoding(d_model)
        self.conv = nn.ModuleList(
            nn.Conv1d(d_model, d_model, 3, padding=1) for _ in range(num_layers)
        )
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.rnn = GRULayers(d_model, d_model, num_layers, dropout)
        self.decoder_layer = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        steps = self.pos_encoder(self.feature_layer(x))  # [B, T, H]
        near = steps
        for conv, layer in zip(self.conv, self.layers, strict=True):
            near = conv(steps.transpose(1, 2)).transpose(1, 2)  # [B, T, H]
            steps = layer(steps + near)
        states, _ = self.rnn(steps + near)
        return self.scores(self.decoder_layer(states[:, -1]))
