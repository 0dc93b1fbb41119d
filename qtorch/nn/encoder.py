"""The Transformer encoder shared by PatchTST and iTransformer."""

from __future__ import annotations

from torch import nn


def encoder(
    d_model: int, nhead: int, num_layers: int, dim_feedforward: int, dropout: float
) -> nn.TransformerEncoder:
    """Return encoder layers with GELU for `[B, tokens, d_model]`, batch first.

    Raises ValueError if `d_model` is not a multiple of `nhead`.
    """
    if d_model % nhead:
        raise ValueError(f"d_model {d_model} is not a multiple of nhead {nhead}.")
    layer = nn.TransformerEncoderLayer(
        d_model,
        nhead,
        dim_feedforward=dim_feedforward,
        dropout=dropout,
        activation="gelu",
        batch_first=True,
    )
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
