"""Ranking losses: compare the samples of the same day; they need day batches."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.metrics.loss import Loss, valid_and_weight, validate_score

_FAR = 1e9  # excludes an element from a softmax but stays finite


class DayLoss(Loss):
    """Mean over days of a loss that is defined on a whole day.

    `score` and `target` are `[G, N]` or `[G, N, Q]`: G cross-sections of N instruments (for each
    of Q label columns). A flat `[B]` raises ValueError, because it does not tell the days apart.
    Elements without a label or outside the mask are ignored; a day with fewer than two remaining
    elements does not count and has no gradient. Weights act within their day; all days count
    equally in the mean.

    Subclasses implement `day_losses`.
    """

    @abstractmethod
    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """The loss `[R]` of R days `[R, N]`; score, target and weight are 0 if not `valid`."""

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is defined on days, not on elements")

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        score = validate_score(score, target)
        if score.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a day, but the scores "
                f"{list(score.shape)} are not grouped by day. Train on day batches: "
                "batch.order=day (in Python, batch={'order': 'day'})."
            )
        valid, share = valid_and_weight(target, weight, mask)
        score = torch.where(valid, score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        rows = [_flatten_labels(t) for t in (score, target, valid, share)]
        has_loss = rows[2].sum(1) >= 2
        loss = self.day_losses(rows[0], rows[1], rows[2], rows[3])
        return torch.where(has_loss, loss, 0.0).sum(), has_loss.sum().to(loss.dtype)

    def dense_sum(self, score: Tensor, target: Tensor) -> Tensor:
        total, days = self.sums(score, target)
        return total * (target.numel() / days)


def _flatten_labels(values: Tensor) -> Tensor:
    """Reshape `[G, N, Q]` to `[G * Q, N]`; return `[G, N]` unchanged."""
    return values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)


def _pearson(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weighted correlation `[R]` of `[R, N]`; about zero with a gradient if x or y is constant."""
    total = weight.sum(1, keepdim=True).clamp_min(1e-12)
    x = (x - (weight * x).sum(1, keepdim=True) / total) * (weight > 0)
    y = (y - (weight * y).sum(1, keepdim=True) / total) * (weight > 0)
    square_x, square_y = (weight * x * x).sum(1), (weight * y * y).sum(1)
    # The floor is below any variance that float32 resolves; it keeps the root's gradient finite.
    return (weight * x * y).sum(1) / (square_x * square_y + 1e-16).sqrt()


class IC(DayLoss):
    """The negative Pearson correlation of score and label within the day."""

    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        return -_pearson(score, target, weight)


class RankIC(DayLoss):
    """The negative correlation of the label's rank with a differentiable rank of the score.

    The soft rank of a score is the sum over the others of sigmoid((own - other) / temperature),
    with the scores standardised within the day. The smaller the temperature, the closer to the
    true rank, and the fewer samples have a gradient. Memory is N x N per day.

    Qin, Liu and Li, "A general approximation framework for direct optimization of information
    retrieval measures", 2010.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected a positive number.")
        self.temperature = temperature

    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        count = valid.sum(1, keepdim=True).clamp_min(1)
        mean = score.sum(1, keepdim=True) / count
        variance = ((score - mean).square() * valid).sum(1, keepdim=True) / count
        score = (score - mean) / (variance + 1e-12).sqrt()
        valid_pairs = valid[:, None, :]
        soft_comparison = torch.sigmoid((score[:, :, None] - score[:, None, :]) / self.temperature)
        rank = (soft_comparison * valid_pairs).sum(2)
        below = (target[:, :, None] > target[:, None, :]) & valid_pairs
        equal = (target[:, :, None] == target[:, None, :]) & valid_pairs
        target_rank = below.sum(2) + 0.5 * equal.sum(2)
        return -_pearson(rank, target_rank.to(rank.dtype), weight)


class Pairwise(DayLoss):
    """RankNet: log(1 + exp(-(difference of scores))) over the pairs whose labels differ.

    Burges et al., "Learning to Rank using Gradient Descent", 2005. Memory is N x N per day.
    """

    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        above = target[:, :, None] > target[:, None, :]
        share = weight[:, :, None] * weight[:, None, :] * above
        loss = F.softplus(score[:, None, :] - score[:, :, None])
        return (loss * share).sum((1, 2)) / share.sum((1, 2)).clamp_min(1e-12)


class ListNet(DayLoss):
    """Cross-entropy between the softmax of the labels and the softmax of the scores.

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007 (top-one
    probabilities). `temperature` divides the labels: the smaller it is, the more the best labels
    of the day dominate.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected a positive number.")
        self.temperature = temperature

    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        penalty = torch.where(valid, 0.0, -_FAR)
        target_probability = (target / self.temperature + penalty).softmax(1) * weight
        target_probability = target_probability / target_probability.sum(1, keepdim=True).clamp_min(
            1e-12
        )
        return -(
            target_probability * torch.where(valid, (score + penalty).log_softmax(1), 0.0)
        ).sum(1)


class ListMLE(DayLoss):
    """The negative log-likelihood per sample of the labels' order under the scores.

    Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm", 2008. Equal labels
    keep the order of the batch.
    """

    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        masked_target = torch.where(valid, target, -torch.inf)
        order = masked_target.argsort(dim=1, descending=True, stable=True)
        score = torch.where(valid, score, -_FAR).gather(1, order)
        remaining = score.flip(1).logcumsumexp(1).flip(1)  # over each sample and all after it
        share = weight.gather(1, order)
        loss = torch.where(valid.gather(1, order), remaining - score, 0.0)
        return (loss * share).sum(1) / share.sum(1).clamp_min(1e-12)
