"""Sums that grow on the device through an epoch and are read once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Tally:
    """Weighted sum of a loss over an epoch, in float64, and what else the epoch has told.

    No attributes of the module itself: setting those costs a small network's step too much.
    `pending` counts batches whose gradients wait for an optimizer step; `told` holds the running
    epoch's metrics.
    """

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Begin an epoch."""
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0  # the part of the weight that is known without asking the device
        self.pending = 0

    def add(self, total: Tensor, share: Tensor | int) -> None:
        """A batch's sum of weight x loss, and its sum of weights."""
        self.loss += total
        if isinstance(share, int):
            self.count += share
        else:
            self.weight += share

    def sums(self) -> Tensor:
        """`[2]` float64 on the device: the loss and the weight."""
        return torch.stack((self.loss, self.weight + self.count))

    def state(self) -> dict[str, Any]:
        """What a checkpoint in mid-epoch holds."""
        return {"sums": self.sums().cpu(), "told": dict(self.told)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint."""
        self.reset(device)
        self.loss, self.weight = (part.to(device) for part in state["sums"].unbind())
        self.told = dict(state["told"])


def weighted_mean(total: float, weight: float) -> float:
    """total / weight; NaN where nothing was counted."""
    return total / weight if weight else math.nan
