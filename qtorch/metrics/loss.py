"""Element-wise losses: weighted means over the samples that have a label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(nn.Module):
    """Weighted mean of an element-wise loss over the elements that have a label.

    `score` and `target` must have the same shape, `[B]` or `[B, Q]` (`[G, N, Q]` for day batches).
    Other shapes raise ValueError, because broadcasting `[B, 1]` against `[B]` would silently
    compare every score with every label (`[B, B]`). `weight` and `mask` have the same shape, with
    or without the last axis. Elements with a NaN target or False in `mask` are ignored; a batch
    without labels has loss zero and a zero gradient. The mean is sum(weight x loss) / sum(weight),
    in float32 or better.

    Subclasses implement `elementwise`.
    """

    def num_outputs(self, num_labels: int) -> int:
        """The number of network outputs needed for `num_labels` label columns."""
        return num_labels

    def readout(self, score: Tensor) -> Tensor:
        """Reduce outputs `[..., Q]` to the score `[...]` for metrics and predictions: the first."""
        return score[..., 0]

    @abstractmethod
    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        """The loss of each element, in the shape of `score` and `target`."""

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        """The sum of `elementwise`. Subclasses override it if one operation computes the sum."""
        return self.elementwise(score, target).sum()

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(sum of weight x loss, sum of weight)`; sums over batches give the exact mean."""
        score = validate_score(score, target)
        valid, weights = valid_and_weight(target, weight, mask)
        # Replace NaN before the loss is computed: a NaN times zero still has a NaN gradient.
        score = torch.where(valid, score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        return (self.elementwise(score, target) * weights).sum(), weights.sum()

    def dense_sum(self, score: Tensor, target: Tensor) -> Tensor:
        """Sum of the loss if every label is present and unweighted; faster than `sums`."""
        score = validate_score(score, target)
        return self.total(score, target.to(score.dtype))

    def forward(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted mean, a scalar."""
        return mean_from_sums(*self.sums(score, target, weight, mask))


def mean_from_sums(total: Tensor, weight_sum: Tensor) -> Tensor:
    """total / weight_sum, or zero if the weights sum to zero."""
    return total / torch.where(weight_sum == 0, 1.0, weight_sum)


def validate_score(score: Tensor, target: Tensor) -> Tensor:
    """Return the score in float32 or better; raise ValueError if its shape is not the target's."""
    if score.shape != target.shape:
        raise ValueError(
            f"score {list(score.shape)} and target {list(target.shape)} differ in shape; a loss "
            "compares them elementwise."
        )
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def valid_and_weight(
    target: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(valid, weight)` in the target's shape: bool mask of labelled elements, and their weight."""
    valid = ~torch.isnan(target)
    if mask is not None:
        valid = valid & broadcast_weight(mask, target, "mask")
    weights = valid.to(torch.float64 if target.dtype == torch.float64 else torch.float32)
    if weight is not None:
        weights = weights * broadcast_weight(weight, target, "weight")
    return valid, weights


def broadcast_weight(values: Tensor, score: Tensor, name: str) -> Tensor:
    """Give weights or a mask without the last axis of the scores that axis, for broadcasting."""
    if values.shape == score.shape:
        return values
    if score.dim() > 1 and values.shape == score.shape[:-1]:
        return values.unsqueeze(-1)
    raise ValueError(
        f"{name} {list(values.shape)} does not match scores {list(score.shape)}; expected the same "
        "shape, with or without the last axis."
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
    """Huber loss: half the squared error up to `delta`, then delta x (|error| - delta / 2).

    Huber, "Robust Estimation of a Location Parameter", 1964.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not delta > 0:
            raise ValueError(f"delta={delta}: expected a positive number.")
        self.delta = delta

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(score, target, reduction="none", delta=self.delta)

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(score, target, reduction="sum", delta=self.delta)


class Quantile(Loss):
    """Pinball loss: trains the score to be the `tau` quantile of the label.

    Koenker and Bassett, "Regression Quantiles", 1978.
    """

    def __init__(self, tau: float = 0.5) -> None:
        super().__init__()
        if not 0 < tau < 1:
            raise ValueError(f"tau={tau}: expected a quantile between 0 and 1.")
        self.tau = tau

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        error = target - score
        return torch.maximum(self.tau * error, (self.tau - 1) * error)


class CrossEntropy(Loss):
    """Cross-entropy over bins of the label; the score is the expected bin.

    There are `num_bins` bins of equal probability for a standard normal label (as produced by
    daily z-score or rank normalisation), or the bins between the ascending `edges`. The network
    has one output per bin, `[B, K]` for one label column `[B]`; the score lies in [-1, 1].
    """

    edges: Tensor

    def __init__(self, num_bins: int = 5, edges: Sequence[float] | None = None) -> None:
        super().__init__()
        if edges is None:
            if num_bins < 2:
                raise ValueError(f"num_bins={num_bins}: expected at least 2.")
            probabilities = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
            bin_edges = torch.special.ndtri(probabilities).float()
        else:
            bin_edges = torch.tensor([float(e) for e in edges])
            if not len(bin_edges) or bool((bin_edges[1:] <= bin_edges[:-1]).any()):
                raise ValueError(f"edges={list(edges)}: expected ascending numbers.")
        self.register_buffer("edges", bin_edges)

    @property
    def num_bins(self) -> int:
        """The number of bins, which is also the number of network outputs."""
        return len(self.edges) + 1

    def num_outputs(self, num_labels: int) -> int:
        if num_labels > 1:
            raise ValueError(f"CrossEntropy supports one label column, got {num_labels}.")
        return self.num_bins

    def readout(self, score: Tensor) -> Tensor:
        bin_values = torch.linspace(-1, 1, self.num_bins, device=score.device)
        return score.float().softmax(-1) @ bin_values

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        """Loss `[...]` of `score [..., K]` and `target [...]`."""
        bins = torch.bucketize(target, self.edges)
        return -score.log_softmax(-1).gather(-1, bins[..., None])[..., 0]

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
                f"{self.num_bins} bins needs scores [B, {self.num_bins}] and targets [B] "
                f"(num_outputs={self.num_bins})."
            )
        score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
        valid, weights = valid_and_weight(target, weight, mask)
        score = torch.where(valid[..., None], score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        return (self.elementwise(score, target) * weights).sum(), weights.sum()

    def dense_sum(self, score: Tensor, target: Tensor) -> Tensor:
        return self.sums(score, target)[0]


class Combined(Loss):
    """A weighted sum of losses: the sum of weight x mean loss over the parts.

    `parts`: pairs (loss, weight). All parts get the same scores and batches, so these must meet
    the requirements of every part. `sum_over_ranks`: set when several ranks share a training
    batch; it sums a tensor over the ranks. Each mean is then taken over the whole batch, and the
    ranks' results add up to the loss of the whole batch.
    """

    def __init__(self, parts: Sequence[tuple[Loss, float]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a sum of losses needs at least one loss.")
        self.parts = nn.ModuleList([loss for loss, _ in parts])
        self.shares = tuple(float(share) for _, share in parts)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError("a sum of losses has no element-wise loss")

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        part_sums = [self._part(loss).sums(score, target, weight, mask) for loss in self.parts]
        count, weight_sums = (
            valid_and_weight(target, None, mask)[0].sum(),
            [weight for _, weight in part_sums],
        )
        total_count = count
        if self.sum_over_ranks is not None and self.training:
            sums = self.sum_over_ranks(torch.stack([count.to(weight_sums[0].dtype), *weight_sums]))
            total_count, *weight_sums = sums.unbind()
        mean = score.new_zeros(())
        for loss_weight, (total, _), weight_sum in zip(
            self.shares, part_sums, weight_sums, strict=True
        ):
            mean = mean + loss_weight * mean_from_sums(total, weight_sum)
        return mean * total_count, count

    @staticmethod
    def _part(loss: nn.Module) -> Loss:
        assert isinstance(loss, Loss), "nn.ModuleList hides the type of its elements"
        return loss

    def dense_sum(self, score: Tensor, target: Tensor) -> Tensor:
        total, count = self.sums(score, target)
        return total * (target.numel() / count)
