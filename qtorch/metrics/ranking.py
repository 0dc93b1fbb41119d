"""Losses that compare the samples of one day with each other: for day batches."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.metrics.loss import Loss, comparable, counted

_FAR = 1e9  # takes an element out of a softmax and stays finite


class DayLoss(Loss):
    """Mean over days of a loss of whole days.

    `score` and `target` are `[G, N]` or `[G, N, Q]`, a cross-section each (for each label
    column); `[B]`, which says nothing of days, is a ValueError. Elements without a label or
    outside the mask are left out; a day on which fewer than two are left counts nothing and has
    no gradient. Weights act within their day. The mean is over days.

    A subclass gives `by_day`.
    """

    @abstractmethod
    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """The loss `[R]` of days `[R, N]`; what is not valid is 0 in score, target and weight."""

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is a loss of days, not of elements")

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        score = comparable(score, target)
        if score.dim() < 2:
            raise ValueError(
                f"{type(self).__name__} compares the samples of a day, but these scores "
                f"{list(score.shape)} say nothing of days. Train on day batches: "
                "batch.order=day (in Python, batch={'order': 'day'})."
            )
        valid, share = counted(target, weight, mask)
        score = torch.where(valid, score, 0.0)
        target = torch.where(valid, target, 0.0).to(score.dtype)
        rows = [_as_days(t) for t in (score, target, valid, share)]
        days = rows[2].sum(1) >= 2
        loss = self.by_day(rows[0], rows[1], rows[2], rows[3])
        return torch.where(days, loss, 0.0).sum(), days.sum().to(loss.dtype)

    def complete_sum(self, score: Tensor, target: Tensor) -> Tensor:
        total, days = self.sums(score, target)
        return total * (target.numel() / days)


def _as_days(values: Tensor) -> Tensor:
    """`[G, N]`, or `[G, N, Q]` as `[G * Q, N]`."""
    return values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)


def _pearson(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weighted correlation `[R]` of `[R, N]`; near zero, with a gradient, where one is constant."""
    total = weight.sum(1, keepdim=True).clamp_min(1e-12)
    x = (x - (weight * x).sum(1, keepdim=True) / total) * (weight > 0)
    y = (y - (weight * y).sum(1, keepdim=True) / total) * (weight > 0)
    square_x, square_y = (weight * x * x).sum(1), (weight * y * y).sum(1)
    # The floor is below any spread that float32 resolves, and keeps the root's gradient finite.
    return (weight * x * y).sum(1) / (square_x * square_y + 1e-16).sqrt()


class IC(DayLoss):
    """Minus the Pearson correlation of score and label within the day."""

    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        return -_pearson(score, target, weight)


class RankIC(DayLoss):
    """Minus the correlation of the label's rank with a differentiable rank of the score.

    The rank of a score is the sum over the others of sigmoid((own - other) / temperature), with
    scores in units of their spread on the day: the smaller the temperature, the nearer to the
    true rank, and the fewer samples have a gradient. Memory is N x N a day.

    Qin, Liu and Li, "A general approximation framework for direct optimization of information
    retrieval measures", 2010.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive.")
        self.temperature = temperature

    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        count = valid.sum(1, keepdim=True).clamp_min(1)
        mean = score.sum(1, keepdim=True) / count
        spread = ((score - mean).square() * valid).sum(1, keepdim=True) / count
        score = (score - mean) / (spread + 1e-12).sqrt()
        others = valid[:, None, :]
        soft = torch.sigmoid((score[:, :, None] - score[:, None, :]) / self.temperature)
        rank = (soft * others).sum(2)
        below = (target[:, :, None] > target[:, None, :]) & others
        equal = (target[:, :, None] == target[:, None, :]) & others
        true = below.sum(2) + 0.5 * equal.sum(2)
        return -_pearson(rank, true.to(rank.dtype), weight)


class Pairwise(DayLoss):
    """RankNet: log(1 + exp(-(difference of scores))) over the pairs whose labels differ.

    Burges et al., "Learning to Rank using Gradient Descent", 2005. Memory is N x N a day.
    """

    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        above = target[:, :, None] > target[:, None, :]
        share = weight[:, :, None] * weight[:, None, :] * above
        loss = F.softplus(score[:, None, :] - score[:, :, None])
        return (loss * share).sum((1, 2)) / share.sum((1, 2)).clamp_min(1e-12)


class ListNet(DayLoss):
    """Cross-entropy between the softmax of the labels and that of the scores.

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007 (the
    probabilities of the first place). `temperature` divides the labels: the smaller, the more
    the day's best count.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive.")
        self.temperature = temperature

    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        out = torch.where(valid, 0.0, -_FAR)
        wanted = (target / self.temperature + out).softmax(1) * weight
        wanted = wanted / wanted.sum(1, keepdim=True).clamp_min(1e-12)
        return -(wanted * torch.where(valid, (score + out).log_softmax(1), 0.0)).sum(1)


class ListMLE(DayLoss):
    """Minus the log-likelihood of the labels' order under the scores, by sample.

    Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm", 2008. Equal labels
    keep the order of the batch.
    """

    def by_day(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        lowest = torch.where(valid, target, -torch.inf)
        order = lowest.argsort(dim=1, descending=True, stable=True)
        score = torch.where(valid, score, -_FAR).gather(1, order)
        left = score.flip(1).logcumsumexp(1).flip(1)  # over this one and all behind it
        share = weight.gather(1, order)
        loss = torch.where(valid.gather(1, order), left - score, 0.0)
        return (loss * share).sum(1) / share.sum(1).clamp_min(1e-12)
