"""MASTER: attention over an instrument's steps, then between instruments, guided by the market."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section import masked_mean
from qtorch.nn.network import Network
from qtorch.nn.transformer import PositionalEncoding


class MASTER(Network):
    """Features weighed by the state of the market, mixed over time, then over instruments.

    Li et al., "MASTER: Market-Guided Stock Transformer for Stock Price Forecasting", AAAI 2024.
    The features from `gate_input_start_index` on, up to `gate_input_end_index` (None: the last),
    describe the market (the columns that the handler's `market` adds, see
    conf/experiment/master.yaml); their newest values give each other feature its weight, the
    more even the higher `beta` is. Follows the authors' master.py (attention over time is not
    scaled there, residuals begin behind the norm). Differences: a batch is whole days with padding
    masked; where no gate columns are given, the day's mean of the features stands for the state
    of the market; `num_outputs`. Authors and Qlib's proposal for it train with
    `day_label: {drop_extreme: 0.05, zscore: true}`.
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
        own, end = d_feat, d_feat if gate_input_end_index is None else gate_input_end_index
        if gate_input_start_index is not None:
            own = gate_input_start_index
            if not 0 < own < end <= d_feat:
                raise ValueError(
                    f"the gate's columns are {own} to {end} of {d_feat} features; expected "
                    "features before them, and one of them at least."
                )
        elif gate_input_end_index is not None:
            raise ValueError("gate_input_end_index is given without gate_input_start_index.")
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be positive.")
        self.beta, self.market = beta, (slice(own, end) if own < d_feat else None)
        self.feature_gate = nn.Linear(own if self.market is None else end - own, own)
        self.feature_layer = nn.Linear(own, d_model)
        self.positions = PositionalEncoding(d_model)
        self.intra = AttentionBlock(d_model, t_nhead, t_dropout, scale=1.0)
        self.inter = AttentionBlock(d_model, s_nhead, s_dropout)
        self.temporal = nn.Linear(d_model, d_model, bias=False)
        self.fc_out = nn.Linear(d_model, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x [G, N, T, F]`, `mask [G, N]` to `[G, N]` or `[G, N, Q]`."""
        own = x[..., : self.feature_layer.in_features]
        own = own * self._gate(x, mask)
        steps = self.positions(self.feature_layer(own).flatten(0, 1))  # [G * N, T, H]
        steps = self.intra(steps).unflatten(0, x.shape[:2])
        steps = steps.transpose(1, 2)  # [G, T, N, H]
        # A day of padding alone attends to all of it, for a softmax of nothing is NaN.
        there = (mask | ~mask.any(1, keepdim=True))[:, None].expand(steps.shape[:3])
        steps = self.inter(steps.flatten(0, 1), there.flatten(0, 1)).unflatten(0, steps.shape[:2])
        steps = steps.transpose(1, 2)  # [G, N, T, H]
        key = self.temporal(steps)
        share = torch.softmax(key @ key[..., -1, :, None], -2)  # [G, N, T, 1]
        return self.scores(self.fc_out((share * steps).sum(-2)))

    def _gate(self, x: Tensor, mask: Tensor) -> Tensor:
        """The weight of each feature, one on average: `[G, N or 1, 1, F]`."""
        newest = x[:, :, -1]  # [G, N, F]
        if self.market is None:
            state = masked_mean(newest, mask)[:, None]
        else:
            state = newest[..., self.market]
        weight = torch.softmax(self.feature_gate(state) / self.beta, -1)
        return (weight * weight.shape[-1])[:, :, None]


class AttentionBlock(nn.Module):
    """Norm, attention within a sequence, norm, two linear layers: `[B, L, H]` to the same.

    `scale` multiplies the logits, None is one over the square root of a head's width.
    """

    def __init__(
        self, d_model: int, nhead: int, dropout: float, scale: float | None = None
    ) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model {d_model} is not a multiple of its {nhead} heads.")
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

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """`x [B, L, H]`; `there [B, L]` bool, what may be attended to (None: everything)."""
        x = self.norm1(x)
        query, key, value = (
            f(x).unflatten(-1, (self.nhead, -1)).transpose(1, 2)  # [B, A, L, H / A]
            for f in (self.qtrans, self.ktrans, self.vtrans)
        )
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if there is None else there[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        x = self.norm2(x + found.transpose(1, 2).flatten(2))
        out: Tensor = x + self.ffn(x)
        return out
