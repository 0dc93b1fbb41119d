"""Transformer: self-attention over the steps of the window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network


class Transformer(Network):
    """Transformer encoder over the window and a linear head on the newest step.

    Vaswani et al., "Attention Is All You Need", 2017. Corresponds to Qlib's
    pytorch_transformer.py and pytorch_transformer_ts.py, with the same layer names. Differences:
    `num_outputs`; `dim_feedforward` can be set (Qlib uses torch's default of 2048); the positional
    encoding is not in the state dict; Qlib's state dict also contains the unused template of its
    encoder layers.
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
        self.feature_layer = nn.Linear(d_feat, d_model)
        self.pos_encoder = PositionalEncoding(d_model)
        self.transformer_encoder = encoder(
            d_model, nhead, num_layers, dim_feedforward, dropout, activation="relu"
        )
        self.decoder_layer = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        steps = self.pos_encoder(self.feature_layer(x))  # [B, T, H]
        steps = self.transformer_encoder(steps)
        return self.scores(self.decoder_layer(steps[:, -1]))


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
        # Not saved with the weights, because the arguments determine it.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        if steps > len(self.table):
            raise ValueError(f"got a window of {steps} steps; expected at most {len(self.table)}.")
        return x + self.table[:steps]


def encoder(
    d_model: int,
    nhead: int,
    num_layers: int,
    dim_feedforward: int,
    dropout: float,
    activation: str = "gelu",
) -> nn.TransformerEncoder:
    """Return encoder layers for `[B, tokens, d_model]`, batch first.

    Raises ValueError if `d_model` is not a multiple of `nhead`.
    """
    check_heads(d_model, nhead)
    layer = nn.TransformerEncoderLayer(
        d_model, nhead, dim_feedforward, dropout, activation, batch_first=True
    )
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def check_heads(d_model: int, nhead: int) -> None:
    """Raise ValueError if attention cannot split `d_model` channels into `nhead` heads."""
    if d_model % nhead:
        raise ValueError(f"d_model {d_model} is not a multiple of nhead {nhead}.")
