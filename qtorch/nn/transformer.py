"""Transformer: self-attention over the steps of the window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network


class PositionalEncoding(nn.Module):
    """Adds the sine and cosine of each step's position to `x [B, T, H]`.

    Raises ValueError for more than `max_len` steps.
    """

    table: Tensor

    def __init__(self, d_model: int, max_len: int = 1000) -> None:
        super().__init__()
        position = torch.arange(max_len, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        table = torch.zeros(max_len, d_model)
        table[:, 0::2] = torch.sin(position * rate)
        table[:, 1::2] = torch.cos(position * rate)[:, : d_model // 2]
        # Not part of the weights: it follows from the arguments.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        if steps > len(self.table):
            raise ValueError(f"a window of {steps} steps; this network takes {len(self.table)}.")
        return x + self.table[:steps]


class Transformer(Network):
    """Transformer encoder; the newest step's state gives the score.

    Vaswani et al., "Attention Is All You Need", 2017. Answers to Qlib's pytorch_transformer.py
    and pytorch_transformer_ts.py; the layers have the same names. Differences: `num_outputs`;
    `dim_feedforward` can be set (Qlib leaves torch's 2048); the table of positions is no part of
    the weights; Qlib's hold the encoder layer that it copies, too, which nothing uses.
    """

    def __init__(
        self,
        d_feat: int = 20,
        d_model: int = 64,
        nhead: int = 2,
        num_layers: int = 2,
        dropout: float = 0.0,
        dim_feedforward: int = 2048,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if d_model % nhead:
            raise ValueError(f"d_model {d_model} is not a multiple of nhead {nhead}.")
        self.feature_layer = nn.Linear(d_feat, d_model)
        self.pos_encoder = PositionalEncoding(d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, dim_feedforward=dim_feedforward, dropout=dropout, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, num_layers, enable_nested_tensor=False
        )
        self.decoder_layer = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        steps = self.pos_encoder(self.feature_layer(x))  # [B, T, H]
        steps = self.transformer_encoder(steps)
        return self.scores(self.decoder_layer(steps[:, -1]))
