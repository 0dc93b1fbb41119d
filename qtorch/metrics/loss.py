"""Losses: weighted means over the samples that have a label, by element or by day."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.core.errors import ConfigError

_FAR = 1e9  # excludes an element from a softmax but stays finite


class BaseLoss(nn.Module, ABC):
    """A loss that is the ratio of two sums, which add up over batches and over ranks.

    Implement `sums` for a loss of whole batches. For a loss of single elements derive from `Loss`
    and implement `elementwise`, for one of whole days from `DayLoss` and implement `day_losses`.

    In each of them, elements with a NaN target or False in `mask` are ignored, and a batch without
    labels has loss zero and a zero gradient. `weight` and `mask` have the shape of the target, with
    or without its last axis.
    """

    @abstractmethod
    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Tensor, Tensor | int]:
        """Return `(sum of weight x loss, sum of weight)`, in float32 or better.

        `complete` is the caller's promise that no label is missing and that weight and mask are
        None: the sums may then be computed faster, and the weight sum may be a number instead of a
        tensor.
        """

    def forward(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted mean, a scalar."""
        total, weight_sum = self.sums(score, target, weight, mask)
        return mean_from_sums(total, torch.as_tensor(weight_sum))

    def num_outputs(self, num_labels: int) -> int:
        """Return the number of network outputs needed for `num_labels` label columns."""
        return num_labels

    def readout(self, score: Tensor) -> Tensor:
        """Reduce outputs `[..., Q]` to the score `[...]` for metrics and predictions: the first."""
        return score[..., 0]


class LabeledScores:
    """Scores and labels of a batch, 0 where an element has no label or is not in the mask.

    `valid` says which elements have one. The parts of a sum of losses share them. `num_labels` is
    the caller's promise that every element in the mask has a label, and that it is their number.
    """

    def __init__(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        num_labels: int | None = None,
    ) -> None:
        score = validate_score(score, target)
        if num_labels is None or mask is None:
            self.valid = has_label(target, mask)
        else:
            self.valid = broadcast_weight(mask, target, "mask").expand_as(target)
        self.weight, self._num_labels = weight, num_labels
        self._weight_dtype = _weight_dtype(target)
        is_missing = ~self.valid
        # Replace NaN before the loss is computed: a NaN times zero still has a NaN gradient.
        self.score = score.masked_fill(is_missing, 0.0)
        self.target = target.masked_fill(is_missing, 0.0).to(score.dtype)

    @cached_property
    def weights(self) -> Tensor:
        """The weight of each element, 0 where it has no label."""
        return _weights(self.valid, self.weight, self._weight_dtype)

    @cached_property
    def count(self) -> Tensor | int:
        """The number of elements with a label."""
        if self._num_labels is not None:
            return self._num_labels
        return self.valid.sum(dtype=self._weight_dtype)


class LabeledLoss(BaseLoss):
    """A loss that is computed from `LabeledScores`."""

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Tensor, Tensor | int]:
        return self.compute_sums(LabeledScores(score, target, weight, mask))

    @abstractmethod
    def compute_sums(self, labeled: LabeledScores) -> tuple[Tensor, Tensor | int]:
        """Return `(sum of weight x loss, sum of weight)`."""


class FunctionLoss(LabeledLoss):
    """A loss of a user's own: a function or a module `(score, target, weight, mask) -> mean`.

    It takes `weight`, `mask` or both as keywords; they have the shape of the score. `weight` is 0,
    and `mask` False, where an element has no label, whose score and target are 0. A loss that takes
    no `weight` cannot be used with a reweighter: ConfigError. The mean of a batch without labels
    must be finite.
    """

    def __init__(self, function: Callable[..., Tensor], keywords: Sequence[str]) -> None:
        super().__init__()
        self.function, self.keywords = function, tuple(keywords)

    def compute_sums(self, labeled: LabeledScores) -> tuple[Tensor, Tensor]:
        if labeled.weight is not None and "weight" not in self.keywords:
            name = getattr(self.function, "__name__", type(self.function).__name__)
            raise ConfigError(
                f"the samples have weights, but the loss {name} takes none: give it an argument "
                "`weight` (0 where a label is missing), or remove the reweighter."
            )
        values = {"weight": labeled.weights, "mask": labeled.valid}
        chosen_values = {name: values[name] for name in self.keywords}
        weight_sum = labeled.weights.sum()
        mean = self.function(labeled.score, labeled.target, **chosen_values)
        return mean * weight_sum, weight_sum


class Loss(LabeledLoss):
    """Weighted mean of an element-wise loss over the elements that have a label.

    `score` and `target` must have the same shape, `[B]` or `[B, Q]` (`[G, N, Q]` for day batches).
    Other shapes raise ValueError, because broadcasting `[B, 1]` against `[B]` would silently
    compare every score with every label (`[B, B]`).

    Subclasses implement `elementwise`. One that sets `is_zero_without_error` promises that the loss
    of an element whose score equals its target is zero: then elements without a label need no
    weight of zero. Classes derived from it must promise it themselves.
    """

    is_zero_without_error: ClassVar[bool] = False

    @abstractmethod
    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each element, in the shape of `score` and `target`."""

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the loss over all elements."""
        return self.elementwise(score, target).sum()

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Tensor, Tensor | int]:
        if not complete:
            return super().sums(score, target, weight, mask)
        score = validate_score(score, target)
        return self.total(score, target.to(score.dtype)), target.numel()

    def compute_sums(self, labeled: LabeledScores) -> tuple[Tensor, Tensor | int]:
        if labeled.weight is None and vars(type(self)).get("is_zero_without_error", False):
            return self.total(labeled.score, labeled.target), labeled.count
        losses = self.elementwise(labeled.score, labeled.target)
        return (losses * labeled.weights).sum(), labeled.weights.sum()


class FunctionalLoss(Loss):
    """A loss of `torch.nn.functional`, which computes loss and sum in one operation."""

    @abstractmethod
    def compute(self, score: Tensor, target: Tensor, reduction: str) -> Tensor:
        """Return the loss with torch's `reduction`, "none" or "sum"."""

    def elementwise(self, score: Tensor, target: Tensor) -> Tensor:
        return self.compute(score, target, "none")

    def total(self, score: Tensor, target: Tensor) -> Tensor:
        return self.compute(score, target, "sum")


class MSE(FunctionalLoss):
    """Mean squared error."""

    is_zero_without_error = True

    def compute(self, score: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.mse_loss(score, target, reduction=reduction)


class MAE(FunctionalLoss):
    """Mean absolute error."""

    is_zero_without_error = True

    def compute(self, score: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.l1_loss(score, target, reduction=reduction)


class Huber(FunctionalLoss):
    """Huber loss: half the squared error up to `delta`, then delta x (|error| - delta / 2).

    Huber, "Robust Estimation of a Location Parameter", 1964.
    """

    is_zero_without_error = True

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not delta > 0:
            raise ValueError(f"delta={delta}: expected a positive number.")
        self.delta = delta

    def compute(self, score: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.huber_loss(score, target, reduction=reduction, delta=self.delta)


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


class CrossEntropy(BaseLoss):
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

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Tensor, Tensor | int]:
        if score.shape != (*target.shape, self.num_bins):
            raise ValueError(
                f"score {list(score.shape)} and target {list(target.shape)}: cross-entropy on "
                f"{self.num_bins} bins needs scores [B, {self.num_bins}] and targets [B] "
                f"(num_outputs={self.num_bins})."
            )
        score = in_single_precision(score)
        valid, weights = valid_and_weight(target, weight, mask)
        is_missing = ~valid
        score = score.masked_fill(is_missing[..., None], 0.0)
        bins = torch.bucketize(target.masked_fill(is_missing, 0.0).to(score.dtype), self.edges)
        losses = -score.log_softmax(-1).gather(-1, bins[..., None])[..., 0]
        return (losses * weights).sum(), target.numel() if complete else weights.sum()


class Combined(BaseLoss):
    """A weighted sum of losses: the sum of weight x mean loss over the parts.

    `parts`: pairs (loss, weight). All parts get the same scores and batches, so these must meet
    the requirements of every part. `sum_over_ranks`: set when several ranks share a training
    batch; it sums a tensor over the ranks. Each mean is then taken over the whole batch, and the
    ranks' results add up to the loss of the whole batch.
    """

    def __init__(self, parts: Sequence[tuple[BaseLoss, float]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a sum of losses needs at least one loss.")
        self.parts = nn.ModuleList([loss for loss, _ in parts])
        self.shares = tuple(float(share) for _, share in parts)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def sums(
        self,
        score: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Tensor, Tensor | int]:
        count: Tensor | int
        if complete:
            part_sums = [loss.sums(score, target, complete=True) for loss in self._losses()]
            count = target.numel()
        else:
            part_sums, count = self._part_sums(score, target, weight, mask)
        if self.sum_over_ranks is not None and self.training:
            return self._sum_over_ranks(part_sums, count), count
        return self._add_means(part_sums, count), count

    def compute_sums(self, labeled: LabeledScores) -> tuple[Tensor, Tensor | int]:
        """Return the sums of parts that are all computed from `LabeledScores`."""
        part_sums = [cast(LabeledLoss, loss).compute_sums(labeled) for loss in self._losses()]
        return self._add_means(part_sums, labeled.count), labeled.count

    def _add_means(
        self, part_sums: Sequence[tuple[Tensor, Tensor | int]], count: Tensor | int
    ) -> Tensor:
        """Return the weighted sum of the parts' means, times `count`."""
        result: Tensor | None = None
        for share, sums in zip(self.shares, part_sums, strict=True):
            result = _add_scaled_mean(result, share, *sums, count)
        assert result is not None
        return result

    def _losses(self) -> list[BaseLoss]:
        return [cast(BaseLoss, loss) for loss in self.parts]

    def _part_sums(
        self, score: Tensor, target: Tensor, weight: Tensor | None, mask: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor | int]], Tensor | int]:
        """Return the sums of each part, and the number of elements with a label."""
        if not any(map(takes_labeled_scores, self._losses())):
            sums = [loss.sums(score, target, weight, mask) for loss in self._losses()]
            return sums, has_label(target, mask).sum()
        labeled = LabeledScores(score, target, weight, mask)
        sums = [
            cast(LabeledLoss, loss).compute_sums(labeled)
            if takes_labeled_scores(loss)
            else loss.sums(score, target, weight, mask)
            for loss in self._losses()
        ]
        return sums, labeled.count

    def _sum_over_ranks(
        self, part_sums: list[tuple[Tensor, Tensor | int]], count: Tensor | int
    ) -> Tensor:
        """Return this rank's share of the sum whose means are taken over all ranks' samples."""
        assert self.sum_over_ranks is not None
        first = part_sums[0][0]
        counts = [
            value if isinstance(value, Tensor) else first.new_full((), value)
            for value in (count, *(weight_sum for _, weight_sum in part_sums))
        ]
        total_count, *weight_sums = self.sum_over_ranks(
            torch.stack([value.to(first.dtype) for value in counts])
        ).unbind()
        means = [
            mean_from_sums(total, weight_sum) * share
            for share, (total, _), weight_sum in zip(
                self.shares, part_sums, weight_sums, strict=True
            )
        ]
        return sum(means[1:], means[0]) * total_count


class DayLoss(LabeledLoss):
    """Mean over days of a loss that is defined on a whole day.

    `score` and `target` are `[G, N]` or `[G, N, Q]`: G cross-sections of N instruments (for each
    of Q label columns). A flat `[B]` raises ConfigError, because it does not tell the days apart.
    Elements without a label or outside the mask are ignored; a day with fewer than two remaining
    elements does not count and has no gradient. Weights act within their day; all days count
    equally in the mean.

    Subclasses implement `day_losses`.
    """

    @abstractmethod
    def day_losses(self, score: Tensor, target: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """Return the loss `[R]` of R days `[R, N]`; score, target and weight are 0 if not `valid`.

        With several label columns, each day occurs once per column.
        """

    def compute_sums(self, labeled: LabeledScores) -> tuple[Tensor, Tensor]:
        shape = labeled.score.shape
        if len(shape) < 2:
            raise ConfigError(
                f"{type(self).__name__} compares the samples of a day, but the scores "
                f"{list(shape)} are not grouped by day. Train on day batches: "
                "batch.order=day (in Python, batch={'order': 'day'})."
            )
        score, target, valid, share = (
            _flatten_labels(t)
            for t in (labeled.score, labeled.target, labeled.valid, labeled.weights)
        )
        is_too_small = valid.sum(1) < 2
        loss = self.day_losses(score, target, valid, share).masked_fill(is_too_small, 0.0)
        return loss.sum(), (~is_too_small).sum(dtype=loss.dtype)


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
        difference = _PairDifferences.apply(score)  # type: ignore[no-untyped-call]  # untyped in torch
        loss = F.softplus(difference)
        return (loss * share).sum((1, 2)) / share.sum((1, 2)).clamp_min(1e-12)


class _PairDifferences(torch.autograd.Function):
    """`score[:, j] - score[:, i]` of each pair `[R, N, N]`; its gradient negates no matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(score: Tensor) -> Tensor:
        return score[:, None, :] - score[:, :, None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.sum(1) - gradient.sum(2)


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
        target_share = (target / self.temperature + penalty).softmax(1) * weight
        target_share = target_share / target_share.sum(1, keepdim=True).clamp_min(1e-12)
        log_share = torch.where(valid, (score + penalty).log_softmax(1), 0.0)
        return -(target_share * log_share).sum(1)


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


# The losses by the name that configurations use.
LOSSES: dict[str, type[BaseLoss]] = {
    "mse": MSE,
    "mae": MAE,
    "huber": Huber,
    "quantile": Quantile,
    "cross_entropy": CrossEntropy,
    "ic": IC,
    "rank_ic": RankIC,
    "pairwise": Pairwise,
    "listnet": ListNet,
    "listmle": ListMLE,
}


def _add_scaled_mean(
    result: Tensor | None,
    share: float,
    total: Tensor,
    weight_sum: Tensor | int,
    count: Tensor | int,
) -> Tensor:
    """Return `result + share * count * total / weight_sum`; `result` None is zero."""
    are_numbers = isinstance(count, int) and isinstance(weight_sum, int)
    is_count = weight_sum is count or (are_numbers and weight_sum == count)
    if not is_count:  # comparing tensors would wait for the GPU
        total = mean_from_sums(total, torch.as_tensor(weight_sum))
        if result is not None and isinstance(count, Tensor):
            return torch.addcmul(result, total, count.to(total.dtype), value=share)
        if result is not None and isinstance(count, int):
            return torch.add(result, total, alpha=share * count)
        total = total * count
    total = total if share == 1 else share * total
    return total if result is None else result + total


def takes_labeled_scores(loss: Any) -> TypeGuard[LabeledLoss | Combined]:
    """Whether a loss, or each part of a sum, has no `sums` of its own but `compute_sums`."""
    if isinstance(loss, Combined):
        return all(map(takes_labeled_scores, loss.parts))
    return isinstance(loss, LabeledLoss) and type(loss).sums in (LabeledLoss.sums, Loss.sums)


def mean_from_sums(total: Tensor, weight_sum: Tensor) -> Tensor:
    """total / weight_sum, or zero if the weights, which are never negative, sum to zero."""
    is_float = weight_sum.is_floating_point()
    return total / weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny if is_float else 1)


def validate_score(score: Tensor, target: Tensor) -> Tensor:
    """Return the score in float32 or better; raise ValueError if its shape is not the target's."""
    if score.shape != target.shape:
        raise ValueError(
            f"score {list(score.shape)} and target {list(target.shape)} differ in shape; a loss "
            "compares them elementwise."
        )
    return in_single_precision(score)


def in_single_precision(values: Tensor) -> Tensor:
    """Return half-precision values in float32, others unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def valid_and_weight(
    target: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(valid, weight)` in the target's shape: bool mask of labelled elements, and their weight."""
    valid = has_label(target, mask)
    return valid, _weights(valid, weight, _weight_dtype(target))


def has_label(target: Tensor, mask: Tensor | None) -> Tensor:
    """Return which elements have a label and are in the mask, bool in the target's shape."""
    valid = target == target  # not NaN, in one operation
    return valid if mask is None else valid & broadcast_weight(mask, target, "mask")


def _weight_dtype(target: Tensor) -> torch.dtype:
    return torch.float64 if target.dtype == torch.float64 else torch.float32


def _weights(valid: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weight of each element, 0 if it is not `valid`."""
    weights = valid.to(dtype)
    return weights if weight is None else weights * broadcast_weight(weight, valid, "weight")


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
