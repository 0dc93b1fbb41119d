"""MASTER: attention over time, then between instruments, guided by the state of the market."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section.layers import masked_mean
from qtorch.nn.network import Network
from qtorch.nn.transformer import PositionalEncoding, check_heads

PADDING_LOGIT = -6e4  # excludes a position from a softmax


class MASTER(Network):
    """Features gated by the state of the market, attention over time, then over instruments.

    Li et al., "MASTER: Market-Guided Stock Transformer for Stock Price Forecasting", AAAI 2024.
    The features from `gate_input_start_index` up to `gate_input_end_index` (exclusive; None: all
    remaining) describe the market: these are the columns that the handler's `market` option adds,
    see conf/experiment/master.yaml. Their newest values determine the weights of the other
    features; a higher `beta` makes the weights more even. Follows the authors' master.py, where
    attention over time is not scaled and residual connections start after the norm. Differences: a
    batch is whole days with padding masked; without gate columns, the mean of the day's features
    represents the state of the market; `num_outputs`. The authors, and the proposal to add MASTER
    to Qlib, train with `day_label: {drop_extreme: 0.05, zscore: true}`.
    """

    cross_section = True

    def __init__(
        self,
        d_feat: int = 158,
        d_model: int = 256,
        t_nhead: int = 4,
        s_nhead: int = 2,
        t_dropout: float = 0.5,
        s_dropout: float = 0.5,
        beta: float = 5.0,
        gate_input_start_index: int | None = None,
        gate_input_end_index: int | None = None,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if not beta > 0:
            raise ValueError(f"beta is {beta}; expected a positive number.")
        self.beta = beta
        self.market: slice | None = None  # the gate columns
        start, end = gate_input_start_index, gate_input_end_index
        if start is None:
            if end is not None:
                raise ValueError("gate_input_end_index requires gate_input_start_index.")
            num_own = num_gate = d_feat
        else:
            end = d_feat if end is None else end
            if not 0 < start < end <= d_feat:
                raise ValueError(
                    f"the gate's columns are {start} to {end} of {d_feat} features; expected at "
                    "least one gate column, and other features before the gate columns."
                )
            self.market = slice(start, end)
            num_own, num_gate = start, end - start
        self.feature_gate = nn.Linear(num_gate, num_own)
        self.feature_layer = nn.Linear(num_own, d_model)
        self.positions = PositionalEncoding(d_model)
        self.intra = AttentionBlock(d_model, t_nhead, t_dropout, scale=1.0)
        self.inter = AttentionBlock(d_model, s_nhead, s_dropout)
        self.temporal = nn.Linear(d_model, d_model, bias=False)
        self.fc_out = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `x [G, N, T, F]`, `mask [G, N]` to scores `[G, N]` or `[G, N, Q]`."""
        features = x[..., : self.feature_layer.in_features]
        features = features * self._gate(x, mask)
        steps = self.positions(self.feature_layer(features).flatten(0, 1))  # [G * N, T, H]
        steps = self.intra(steps).unflatten(0, x.shape[:2])
        steps = steps.transpose(1, 2)  # [G, T, N, H]
        # Finite, also in half precision: a day with padding only has a softmax that is not NaN.
        logits = (~mask * PADDING_LOGIT)[:, None].expand(steps.shape[:3])
        steps = self.inter(steps.flatten(0, 1), logits.flatten(0, 1)).unflatten(0, steps.shape[:2])
        steps = steps.transpose(1, 2)  # [G, N, T, H]
        key = self.temporal(steps)
        share = torch.softmax(key @ key[..., -1, :, None], -2)  # [G, N, T, 1]
        state = share.to(steps.dtype).transpose(-1, -2) @ steps  # [G, N, 1, H]
        return self.scores(self.fc_out(state.squeeze(-2)))

    def _gate(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the weight of each feature, with mean one: `[G, N or 1, 1, F]`."""
        newest = x[:, :, -1]  # [G, N, F]
        if self.market is None:
            state = masked_mean(newest, mask)[:, None]
        else:
            state = newest[..., self.market]
        weight = torch.softmax(self.feature_gate(state) / self.beta, -1)
        return (weight * weight.shape[-1])[:, :, None]


class AttentionBlock(nn.Module):
    """Norm, self-attention, norm, feed-forward layers: `[B, L, H]` to `[B, L, H]`.

    `scale` multiplies the logits (None: one over the square root of a head's width).
    """

    def __init__(
        self, d_model: int, nhead: int, dropout: float, scale: float | None = None
    ) -> None:
        super().__init__()
        check_heads(d_model, nhead)
        self.nhead, self.dropout, self.scale = nhead, dropout, scale
        self.qtrans = nn.Linear(d_model, d_model, bias=False)
        self.ktrans = nn.Linear(d_model, d_model, bias=False)
        self.vtrans = nn.Linear(d_model, d_model, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_model, d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Apply the block to `x [B, L, H]`.

        `logits [B, L]` are added to the logits of each position (None: nothing).
        """
        x = self.norm1(x)
        # One product for the three of them.
        weight = torch.cat([layer.weight for layer in (self.qtrans, self.ktrans, self.vtrans)])
        query, key, value = (
            part.reshape(*x.shape[:2], self.nhead, -1).transpose(1, 2)  # [B, A, L, H / A]
            for part in F.linear(x, weight).chunk(3, -1)
        )
        attention = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if logits is None else logits[:, None, None].to(query.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        x = self.norm2(x + attention.transpose(1, 2).flatten(2))
        return x + self.ffn(x)
