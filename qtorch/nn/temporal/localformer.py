"""Localformer: a Transformer with convolutions over neighboring steps."""

from __future__ import annotations

from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import GRULayers
from qtorch.nn.transformer import PositionalEncoding, check_heads


class Localformer(Network):
    """Transformer encoder layers, each with a convolution over time added to its input, then a
    GRU with a linear head on its last state.

    The idea is from Li et al., "Enhancing the Locality and Breaking the Memory Bottleneck of
    Transformer on Time Series Forecasting", 2019. The architecture corresponds to Qlib's
    pytorch_localformer.py and pytorch_localformer_ts.py and has no paper of its own. Differences:
    Qlib's state dict also contains the unused template of its encoder layers; Qlib's layers start
    as equal copies, while here each layer is initialized independently; `dim_feedforward` and
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
        check_heads(d_model, nhead)
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
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        steps = self.pos_encoder(self.feature_layer(x))  # [B, T, H]
        local = steps
        for conv, layer in zip(self.conv, self.layers, strict=True):
            local = conv(steps.transpose(1, 2)).transpose(1, 2)  # [B, T, H]
            steps = layer(steps + local)
        states, _ = self.rnn(steps + local)
        return self.scores(self.decoder_layer(states[:, -1]))
