"""iTransformer: attention between features, each a token that holds its whole window."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.encoder import encoder
from qtorch.nn.network import Network


class ITransformer(Network):
    """Each feature's window is embedded as one token; an encoder relates the features.

    Liu et al., "iTransformer: Inverted Transformers Are Effective for Time Series Forecasting",
    ICLR 2024. Adapted: the tokens together give one score, where the paper forecasts each series
    from its own token. Windows are not normalised one by one (the paper's are, and the forecast
    scaled back): a score has no scale to go back to, and the level of a feature is information.
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
        """`x [B, T, F]` to `[B]` or `[B, Q]`."""
        tokens = self.dropout(self.embed(x.transpose(1, 2)))  # [B, F, H]
        tokens = self.norm(self.encoder(tokens))
        return self.scores(self.head(tokens.flatten(1)))
