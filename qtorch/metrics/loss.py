"""Losses: weighted means over the samples that have a label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

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

    def num_outputs(self, num_labels: int) -> int:
        """Outputs that a network needs for so many label columns."""
        return num_labels

    def readout(self, score: Tensor) -> Tensor:
        """Outputs `[..., Q]` as the one score `[...]` that is judged and predicted: the first."""
        return score[..., 0]

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
        score = comparable(score, target)
        valid, share = counted(target, weight, mask)
        # Both sides are filled before the loss: a NaN times zero would still be a NaN gradient.
        score = torch.where(valid, score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        return (self.elementwise(score, target) * share).sum(), share.sum()

    def complete_sum(self, score: Tensor, target: Tensor) -> Tensor:
        """Sum of the loss where no label is missing and none weighs more: fewer operations."""
        score = comparable(score, target)
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


def comparable(score: Tensor, target: Tensor) -> Tensor:
    """The score in float32 or better; a ValueError where its shape is not the target's."""
    if score.shape != target.shape:
        raise ValueError(
            f"score {list(score.shape)} and target {list(target.shape)} differ in shape; a loss "
            "compares them element by element."
        )
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def counted(target: Tensor, weight: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(what has a label and counts, bool; its weight)`, both in the target's shape."""
    valid = ~torch.isnan(target)
    if mask is not None:
        valid = valid & spread(mask, target, "mask")
    share = valid.to(torch.float64 if target.dtype == torch.float64 else torch.float32)
    if weight is not None:
        share = share * spread(weight, target, "weight")
    return valid, share


def spread(values: Tensor, score: Tensor, name: str) -> Tensor:
    """Weights or a mask in the shape of the scores, whose last axis they may lack."""
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


class Quantile(Loss):
    """Pinball loss: the score becomes the `tau` quantile of the label.

    Koenker and Bassett, "Regression Quantiles", 1978.
    """

    def __init__(self, tau: float = 0.5) -> None:
        super().__init__()
        if not 0 < tau < 1:
            raise ValueError(f"tau is {tau}; a quantile lies between 0 and 1.")
        self.tau = tau

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        error = target - score
        return torch.maximum(self.tau * error, (self.tau - 1) * error)


class CrossEntropy(Loss):
    """Cross-entropy of the bin that the label falls into; the score is the expected bin.

    `num_bins` bins of equal probability under a standard normal label (what a z-score or rank
    normalisation by day gives), or those between the ascending `edges`. The network has an
    output for each bin, `[B, K]` for one label column `[B]`; its score lies in [-1, 1].
    """

    edges: Tensor

    def __init__(self, num_bins: int = 5, edges: Sequence[float] | None = None) -> None:
        super().__init__()
        if edges is None:
            if num_bins < 2:
                raise ValueError(f"num_bins is {num_bins}; there must be two bins at least.")
            shares = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
            found = torch.special.ndtri(shares).float()
        else:
            found = torch.tensor([float(e) for e in edges])
            if not len(found) or bool((found[1:] <= found[:-1]).any()):
                raise ValueError(f"edges are {list(edges)}; they must ascend.")
        self.register_buffer("edges", found)

    @property
    def num_bins(self) -> int:
        """Bins, and outputs of the network."""
        return len(self.edges) + 1

    def num_outputs(self, num_labels: int) -> int:
        if num_labels > 1:
            raise ValueError(f"CrossEntropy takes one label column, there are {num_labels}.")
        return self.num_bins

    def readout(self, score: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, self.num_bins, device=score.device)
        return score.float().softmax(-1) @ place

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        """`score [..., K]`, `target [...]` to `[...]`."""
        chosen = torch.bucketize(target, self.edges)
        return -score.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if score.shape != (*target.shape, self.num_bins):
            raise ValueError(
                f"score {list(score.shape)} and target {list(target.shape)}: cross-entropy on "
                f"{self.num_bins} bins compares [B, {self.num_bins}] with [B] (num_outputs="
                f"{self.num_bins})."
            )
        score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
        valid, share = counted(target, weight, mask)
        score = torch.where(valid[..., None], score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        return (self.elementwise(score, target) * share).sum(), share.sum()

    def complete_sum(self, score: Tensor, target: Tensor) -> Tensor:
        return self.sums(score, target)[0]


class Combined(Loss):
    """A weighted sum of losses: sum of weight x mean of each.

    `parts`: pairs (loss, weight). What one of them asks of scores and batches they all get.
    `whole`: where ranks share a training batch, what adds a tensor up over them: each mean is of
    the whole batch then, and this rank's part of it adds up with the others'.
    """

    def __init__(self, parts: Sequence[tuple[Loss, float]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a sum of losses needs one at least.")
        self.parts = nn.ModuleList([loss for loss, _ in parts])
        self.shares = tuple(float(share) for _, share in parts)
        self.whole: Callable[[Tensor], Tensor] | None = None

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError("a sum of losses has no loss of one element")

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        found = [self._part(loss).sums(score, target, weight, mask) for loss in self.parts]
        count, weights = counted(target, None, mask)[0].sum(), [weight for _, weight in found]
        all_of_it = count
        if self.whole is not None and self.training:
            sums = self.whole(torch.stack([count.to(weights[0].dtype), *weights]))
            all_of_it, *weights = sums.unbind()
        mean = score.new_zeros(())
        for share, (total, _), counts in zip(self.shares, found, weights, strict=True):
            mean = mean + share * mean_of(total, counts)
        return mean * all_of_it, count

    @staticmethod
    def _part(loss: nn.Module) -> Loss:
        assert isinstance(loss, Loss), "asked where the parts are given"
        return loss

    def complete_sum(self, score: Tensor, target: Tensor) -> Tensor:
        total, count = self.sums(score, target)
        return total * (target.numel() / count)
