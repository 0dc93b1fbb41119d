"""Loss sums that accumulate on the device during an epoch and are read once at its end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class LossAccumulator:
    """Weighted loss sum of an epoch in float64, and the metrics of that epoch.

    These are not attributes of the LightningModule itself because `nn.Module.__setattr__` costs a
    noticeable part of a small network's step. `num_pending` counts the batches whose gradients have
    not been used by an optimizer step yet (gradient accumulation). `epoch_metrics` holds the
    metrics of the running epoch.
    """

    def __init__(self) -> None:
        self.epoch_metrics: dict[str, float] = {}
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Start a new epoch."""
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0  # the part of the weight that is known on the host
        self.num_pending = 0

    def add(self, total: Tensor, weight: Tensor | int) -> None:
        """Add a batch: its sum of weight x loss, and its sum of weights."""
        self.loss += total
        if isinstance(weight, int):
            self.count += weight
        else:
            self.weight += weight

    def sums(self) -> Tensor:
        """Return the loss sum and the weight sum, `[2]` float64 on the device."""
        return torch.stack((self.loss, self.weight + self.count))

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint in the middle of an epoch holds."""
        return {"sums": self.sums().cpu(), "told": dict(self.epoch_metrics)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state of a checkpoint."""
        self.reset(device)
        self.loss, self.weight = (part.to(device) for part in state["sums"].unbind())
        self.epoch_metrics = dict(state["told"])


def mean_or_nan(total: float, weight: float) -> float:
    """Return total / weight, or NaN if the weight is zero."""
    return total / weight if weight else math.nan
