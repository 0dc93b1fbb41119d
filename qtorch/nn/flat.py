"""FlatInput: gives a network for tables the features of a window as one row."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn


class FlatInput(nn.Module):
    """Calls `network` with `x [B, F * T]` instead of `[B, T, F]`.

    For a network that expects the features of one day, as those of Qlib's GeneralPTNN on a DatasetH
    and of its DNNModelPytorch do.
    """

    inputs: ClassVar[Literal["window", "flat"]] = "flat"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, F * T]` to what the network returns."""
        scores: Tensor = self.network(x)
        return scores
