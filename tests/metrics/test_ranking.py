from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qtorch.metrics.loss import IC, DayLoss, ListMLE, ListNet, Pairwise, RankIC, mean_from_sums

NAN = float("nan")
LOSSES = [IC(), RankIC(), Pairwise(), ListNet(), ListMLE()]
for_each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def random_days(g: int = 4, n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    score, target = torch.randn(g, n, generator=generator), torch.randn(g, n, generator=generator)
    mask = torch.rand(g, n, generator=generator) > 0.2
    target[0, 0] = NAN
    return score, target, mask


def valid_samples(score: Tensor, target: Tensor, mask: Tensor, day: int) -> tuple[Tensor, Tensor]:
    keep = mask[day] & ~target[day].isnan()
    return score[day][keep], target[day][keep]


def assert_is_mean_over_days(
    loss: DayLoss,
    days: tuple[Tensor, Tensor, Tensor],
    day_loss: Callable[[Tensor, Tensor], float],
    **tolerance: float,
) -> None:
    """Assert that a loss is the mean of `day_loss(score, target)` over each day's valid samples."""
    score, target, mask = days
    expected = np.mean([day_loss(*valid_samples(*days, k)) for k in range(len(score))])
    assert loss(score, target, mask=mask).item() == pytest.approx(expected, **tolerance)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    return np.corrcoef(first.argsort().argsort(), second.argsort().argsort())[0, 1]


def test_ic_loss_is_the_negative_mean_pearson() -> None:
    assert_is_mean_over_days(
        IC(), random_days(), lambda s, t: -np.corrcoef(s.numpy(), t.numpy())[0, 1], abs=1e-6
    )


def test_weighted_ic_loss_by_hand() -> None:
    score, target, _ = random_days(1, 5, seed=2)
    target = torch.nan_to_num(target)
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0, 0.0]])
    repeated = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    expected = np.corrcoef(score[0, repeated], target[0, repeated])[0, 1]
    assert IC()(score, target, weight).item() == pytest.approx(-expected, abs=1e-6)


def test_rank_ic_at_low_temperature_is_spearman() -> None:
    days = random_days(3, 12, seed=1)
    loss = RankIC(temperature=1e-4)
    assert_is_mean_over_days(loss, days, lambda s, t: -rank_correlation(s, t), abs=1e-4)


def test_pairwise_loss_by_hand() -> None:
    def day_loss(s: Tensor, t: Tensor) -> float:
        pairs = [(i, j) for i, j in itertools.permutations(range(len(s)), 2) if t[i] > t[j]]
        return np.mean([math.log1p(math.exp(-(s[i] - s[j]))) for i, j in pairs])

    assert_is_mean_over_days(Pairwise(), random_days(2, 6, seed=3), day_loss, rel=1e-5)


def test_listmle_is_the_likelihood_of_the_label_order() -> None:
    def day_loss(s: Tensor, t: Tensor) -> float:
        weights = s[t.argsort(descending=True)].exp().tolist()
        shares = [weight / sum(weights[k:]) for k, weight in enumerate(weights)]
        return -np.mean(np.log(shares))

    assert_is_mean_over_days(ListMLE(), random_days(2, 5, seed=4), day_loss, rel=1e-5)


def test_listnet_is_the_top_one_cross_entropy() -> None:
    def day_loss(s: Tensor, t: Tensor) -> float:
        return -(t.softmax(0) * s.log_softmax(0)).sum().item()

    assert_is_mean_over_days(ListNet(), random_days(2, 5, seed=5), day_loss, rel=1e-5)


@for_each_loss
def test_masked_and_unlabelled_samples_are_ignored(loss: DayLoss) -> None:
    score, target, mask = random_days()
    changed_score = torch.where(mask & ~target.isnan(), score, 77.0).requires_grad_()
    loss_value = loss(changed_score, target, mask=mask)
    torch.testing.assert_close(loss_value, loss(score, target, mask=mask))
    loss_value.backward()
    assert changed_score.grad is not None
    assert torch.isfinite(changed_score.grad).all()
    assert (changed_score.grad[~mask] == 0).all()
    assert changed_score.grad[0, 0] == 0
    assert changed_score.grad.abs().sum() > 0


@for_each_loss
def test_minimising_the_loss_sorts_the_samples(loss: DayLoss) -> None:
    _, target, mask = random_days(2, 8, seed=6)
    score = torch.zeros(2, 8).normal_(generator=torch.Generator().manual_seed(1))
    score.requires_grad_()
    optimizer = torch.optim.Adam([score], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(score, target, mask=mask).backward()
        optimizer.step()
    for k in range(2):
        assert rank_correlation(*valid_samples(score.detach(), target, mask, k)) > 0.9


@for_each_loss
def test_day_sums_add_up_and_labels_count_as_days(loss: DayLoss) -> None:
    score, target, mask = random_days()
    parts = [loss.sums(score[k : k + 2], target[k : k + 2], mask=mask[k : k + 2]) for k in (0, 2)]
    total, share = (sum(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(mean_from_sums(total, share), loss(score, target, mask=mask))
    pair = torch.stack([score, -score], -1), torch.stack([target, target], -1)
    expected = (loss(score, target, mask=mask) + loss(-score, target, mask=mask)) / 2
    torch.testing.assert_close(loss(*pair, mask=mask), expected)


@for_each_loss
def test_single_sample_days_and_constant_scores_are_finite(loss: DayLoss) -> None:
    score = torch.zeros(2, 3, requires_grad=True)
    target = torch.tensor([[1.0, NAN, NAN], [1.0, 2.0, 3.0]])
    total, count = loss.sums(score, target)
    assert count.item() == 1
    total.backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()
    assert (score.grad[0] == 0).all()
    empty_loss = loss(score[:1], target[:1])
    assert empty_loss.item() == 0.0


@for_each_loss
def test_flat_scores_and_shape_mismatch_are_rejected(loss: DayLoss) -> None:
    with pytest.raises(ValueError, match="order=day"):
        loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match="differ in shape"):
        loss(torch.zeros(2, 5, 1), torch.zeros(2, 5))


def test_non_positive_temperature_is_rejected() -> None:
    for cls in (RankIC, ListNet):
        with pytest.raises(ValueError, match="temperature"):
            cls(0.0)


@for_each_loss
def test_complete_labels_give_the_same_sums(loss: DayLoss) -> None:
    score, target, _ = random_days()
    target = torch.nan_to_num(target)
    sums, complete_sums = (loss.sums(score, target, complete=c) for c in (False, True))
    assert [float(v) for v in complete_sums] == [float(v) for v in sums]
    constant = torch.zeros(2, 3)
    total, count = loss.sums(constant[:, :1], constant[:, :1], complete=True)
    assert (float(total), float(count)) == (0.0, 0.0)  # days of one sample do not count
    assert torch.isfinite(loss.sums(constant, constant, complete=True)[0])
