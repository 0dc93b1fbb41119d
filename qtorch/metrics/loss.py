"""Losses: weighted means over the samples that have a label."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(nn.Module):
    """Weighted mean of an element-wise loss over what has a label.

    `score` and `target` have one shape, `[B]` or `[B, Q]` (`[G, N, Q]` for day batches); another
    shape is a ValueError, for broadcasting `[B, 1]` against `[B]` gives a `[B, B]` of nonsense.
    `weight` and `mask` have that shape, or lack its last axis. A NaN target or a False in `mask`
    takes an element out; a batch without any label has loss zero and no gradient. The mean is
    sum(weight x loss) / sum(weight), in float32 or better.

    A subclass gives `elementwise`.
    """

    @abstractmethod
    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        """The loss of each element, of the same shape as `score` and `target`."""

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        """The sum of `elementwise`, where one operation gives it."""
        return self.elementwise(score, target).sum()

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(sum of weight x loss, sum of weight)`: what adds up over batches to an exact mean."""
        score = _comparable(score, target)
        valid = ~torch.isnan(target)
        if mask is not None:
            valid = valid & _spread(mask, score, "mask")
        share = valid.to(score.dtype)
        if weight is not None:
            share = share * _spread(weight, score, "weight")
        # Both sides are filled before the loss: a NaN times zero would still be a NaN gradient.
        score = torch.where(valid, score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        return (self.elementwise(score, target) * share).sum(), share.sum()

    def complete_sum(self, score: Tensor, target: Tensor) -> Tensor:
        """Sum of the loss where no label is missing and none weighs more: fewer operations."""
        score = _comparable(score, target)
        return self.total(score, target.to(score.dtype))

    def forward(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted mean, a scalar."""
        return mean_of(*self.sums(score, target, weight, mask))


def mean_of(total: Tensor, share: Tensor) -> Tensor:
    """total / share, and zero where the share is zero."""
    return total / torch.where(share == 0, 1.0, share)


def _comparable(score: Tensor, target: Tensor) -> Tensor:
    if score.shape != target.shape:
        raise ValueError(
            f"score {list(score.shape)} and target {list(target.shape)} differ in shape; a loss "
            "compares them element by element."
        )
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def _spread(values: Tensor, score: Tensor, name: str) -> Tensor:
    if values.shape == score.shape:
        return values
    if score.dim() > 1 and values.shape == score.shape[:-1]:
        return values.unsqueeze(-1)
    raise ValueError(
        f"{name} {list(values.shape)} does not fit scores {list(score.shape)}; expected that "
        "shape, or that shape without its last axis."
    )


class MSE(Loss):
    """Mean squared error."""

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(score, target, reduction="none")

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(score, target, reduction="sum")


class MAE(Loss):
    """Mean absolute error."""

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(score, target, reduction="none")

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(score, target, reduction="sum")


class Huber(Loss):
    """Squared within `delta`, absolute beyond: delta x (|error| - delta / 2).

    Huber, "Robust Estimation of a Location Parameter", 1964.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not delta > 0:
            raise ValueError(f"delta is {delta}; it must be positive.")
        self.delta = delta

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(score, target, reduction="none", delta=self.delta)

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(score, target, reduction="sum", delta=self.delta)


LOSSES: dict[str, type[Loss]] = {"mse": MSE, "mae": MAE, "huber": Huber}
