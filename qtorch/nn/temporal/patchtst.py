"""PatchTST: attention between patches of time, with one encoder shared by all features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.transformer import encoder


class PatchTST(Network):
    """Split each feature's window into patches, encode the features separately with shared
    weights, then score from the encoded patches of all features.

    Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", ICLR
    2023. As in the paper, the window is padded with `stride` copies of its last step, so that the
    last patch contains the newest step. Adapted: one score from all features, while the paper
    forecasts each series from its own past; layer norms instead of batch norms; no instance
    normalization unless `instance_norm` (a score has no scale to return to, and a feature's level
    is information).
    """

    def __init__(
        self,
        d_feat: int = 20,
        step_len: int = 20,
        patch_len: int = 4,
        stride: int = 2,
        d_model: int = 32,
        nhead: int = 4,
        num_layers: int = 2,
        dim_feedforward: int = 64,
        dropout: float = 0.1,
        instance_norm: bool = False,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if not 1 <= stride <= patch_len <= step_len + stride:
            raise ValueError(
                f"patches of {patch_len} steps with stride {stride} do not fit a window of "
                f"{step_len} steps: expected 1 <= stride <= patch_len <= step_len + stride."
            )
        self.patch_len, self.stride, self.instance_norm = patch_len, stride, instance_norm
        num_patches = (step_len + stride - patch_len) // stride + 1
        self.embed = nn.Linear(patch_len, d_model)
        self.position = nn.Parameter(torch.empty(num_patches, d_model).uniform_(-0.02, 0.02))
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder(d_model, nhead, num_layers, dim_feedforward, dropout)
        self.level = nn.Linear(num_patches * d_model, d_model)
        self.head = nn.Linear(d_feat * d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        b, _, f = x.shape
        x = x.transpose(1, 2)  # [B, F, T]
        if self.instance_norm:
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        x = F.pad(x, (0, self.stride), mode="replicate")
        patches = x.unfold(2, self.patch_len, self.stride)  # [B, F, patches, patch_len]
        tokens = self.dropout(self.embed(patches) + self.position).flatten(0, 1)
        states = self.encoder(tokens).flatten(1)  # [B * F, patches * H]
        level = F.gelu(self.level(states)).view(b, f, -1)  # [B, F, H]
        return self.scores(self.head(level.flatten(1)))
