"""MLP: fully connected layers over the flat window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network

ACTIVATIONS = ("LeakyReLU", "SiLU")


class MLP(Network):
    """Dropout, then a linear layer, batch normalization and activation for each of `layers`.

    Corresponds to Qlib's pytorch_nn.py (`Net` of DNNModelPytorch), with the same `layers`, `act`
    and initialization. Differences: `d_feat` instead of `input_dim`, `num_outputs` instead of
    `output_dim`; `dropout` can be set (0.05 in Qlib); a training batch of one sample works.
    """

    inputs: ClassVar[Literal["window", "flat"]] = "flat"
    layer_chain: ClassVar[str | None] = "layers"

    def __init__(
        self,
        d_feat: int = 360,
        layers: Sequence[int] = (256,),
        act: str = "LeakyReLU",
        dropout: float = 0.05,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}.")
        parts: list[nn.Module] = [nn.Dropout(dropout)]
        width = d_feat
        for size in layers:
            activation = nn.LeakyReLU(0.1) if act == "LeakyReLU" else nn.SiLU()
            parts += [nn.Linear(width, size), BatchNorm(size), activation]
            width = size
        parts += [nn.Dropout(dropout), nn.Linear(width, num_outputs)]
        self.layers = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Linear):
                nn.init.kaiming_normal_(part.weight, a=0.1, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, F * T]` to scores `[B]` or `[B, Q]`."""
        return self.scores(self.layers(x))


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that normalizes a training batch of one sample with the running statistics.

    torch raises an error for it, but the last batch of an epoch may have a single sample.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)
