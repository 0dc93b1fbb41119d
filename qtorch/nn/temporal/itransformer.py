"""iTransformer: attention between features, each embedded with its whole window as one token."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.transformer import encoder


class ITransformer(Network):
    """Embed each feature's window as one token, and apply a Transformer encoder over features.

    Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting",
    ICLR 2024. Adapted: one score is computed from all tokens, while the paper forecasts each
    series from its own token. Windows are not normalized individually (the paper does, and scales
    the forecast back): a score has no scale to return to, and a feature's level is information.
    """

    def __init__(
        self,
        d_feat: int = 20,
        step_len: int = 20,
        d_model: int = 64,
        nhead: int = 4,
        num_layers: int = 2,
        dim_feedforward: int = 128,
        dropout: float = 0.1,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.embed = nn.Linear(step_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder(d_model, nhead, num_layers, dim_feedforward, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_feat * d_model, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        tokens = self.dropout(self.embed(x.transpose(1, 2)))  # [B, F, H]
        tokens = self.norm(self.encoder(tokens))
        return self.scores(self.head(tokens.flatten(1)))
