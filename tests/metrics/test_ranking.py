from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qtorch.metrics.loss import mean_of
from qtorch.metrics.ranking import IC, DayLoss, ListMLE, ListNet, Pairwise, RankIC

NAN = float("nan")
LOSSES = [IC(), RankIC(), Pairwise(), ListNet(), ListMLE()]
named = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def days(g: int = 4, n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    score, target = torch.randn(g, n, generator=generator), torch.randn(g, n, generator=generator)
    mask = torch.rand(g, n, generator=generator) > 0.2
    target[0, 0] = NAN
    return score, target, mask


def alone(score: Tensor, target: Tensor, mask: Tensor, day: int) -> tuple[Tensor, Tensor]:
    keep = mask[day] & ~target[day].isnan()
    return score[day][keep], target[day][keep]


def test_ic_is_minus_the_mean_pearson_of_the_days() -> None:
    score, target, mask = days()
    expected = [
        np.corrcoef(*(t.numpy() for t in alone(score, target, mask, k)))[0, 1] for k in range(4)
    ]
    assert IC()(score, target, mask=mask).item() == pytest.approx(-np.mean(expected), abs=1e-6)


def test_a_weighted_ic_by_hand() -> None:
    score, target, _ = days(1, 5, seed=2)
    target = torch.nan_to_num(target)
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0, 0.0]])
    repeated = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    expected = np.corrcoef(score[0, repeated], target[0, repeated])[0, 1]
    assert IC()(score, target, weight).item() == pytest.approx(-expected, abs=1e-6)


def test_a_cold_rank_ic_is_spearmans() -> None:
    score, target, mask = days(3, 12, seed=1)
    expected = []
    for k in range(3):
        s, t = alone(score, target, mask, k)
        expected.append(np.corrcoef(s.argsort().argsort(), t.argsort().argsort())[0, 1])
    found = RankIC(temperature=1e-4)(score, target, mask=mask).item()
    assert found == pytest.approx(-np.mean(expected), abs=1e-4)


def test_pairs_by_hand() -> None:
    score, target, mask = days(2, 6, seed=3)
    expected = []
    for k in range(2):
        s, t = alone(score, target, mask, k)
        pairs = [(i, j) for i, j in itertools.permutations(range(len(s)), 2) if t[i] > t[j]]
        expected.append(np.mean([math.log1p(math.exp(-(s[i] - s[j]))) for i, j in pairs]))
    found = Pairwise()(score, target, mask=mask).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_listmle_is_the_likelihood_of_the_order() -> None:
    score, target, mask = days(2, 5, seed=4)
    expected = []
    for k in range(2):
        s, t = alone(score, target, mask, k)
        left, total = s[t.argsort(descending=True)].tolist(), 0.0
        count = len(left)
        while left:
            total -= math.log(math.exp(left[0]) / sum(math.exp(v) for v in left))
            left.pop(0)
        expected.append(total / count)
    found = ListMLE()(score, target, mask=mask).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_listnet_is_the_cross_entropy_of_first_places() -> None:
    score, target, mask = days(2, 5, seed=5)
    expected = []
    for k in range(2):
        s, t = alone(score, target, mask, k)
        expected.append(-(t.softmax(0) * s.log_softmax(0)).sum().item())
    found = ListNet()(score, target, mask=mask).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


@named
def test_what_is_masked_or_unknown_changes_nothing(loss: DayLoss) -> None:
    score, target, mask = days()
    other = torch.where(mask & ~target.isnan(), score, 77.0).requires_grad_()
    found = loss(other, target, mask=mask)
    torch.testing.assert_close(found, loss(score, target, mask=mask))
    found.backward()
    assert other.grad is not None
    assert torch.isfinite(other.grad).all()
    assert (other.grad[~mask] == 0).all()
    assert other.grad[0, 0] == 0
    assert other.grad.abs().sum() > 0


@named
def test_learning_by_it_puts_the_samples_in_order(loss: DayLoss) -> None:
    _, target, mask = days(2, 8, seed=6)
    score = torch.zeros(2, 8).normal_(generator=torch.Generator().manual_seed(1))
    score.requires_grad_()
    optimizer = torch.optim.Adam([score], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(score, target, mask=mask).backward()
        optimizer.step()
    for k in range(2):
        s, t = alone(score.detach(), target, mask, k)
        rank_ic = np.corrcoef(s.argsort().argsort(), t.argsort().argsort())[0, 1]
        assert rank_ic > 0.9


@named
def test_days_add_up_to_the_mean_and_several_labels_are_several_days(loss: DayLoss) -> None:
    score, target, mask = days()
    parts = [loss.sums(score[k : k + 2], target[k : k + 2], mask=mask[k : k + 2]) for k in (0, 2)]
    total, share = (sum(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(mean_of(total, share), loss(score, target, mask=mask))
    both = torch.stack([score, -score], -1), torch.stack([target, target], -1)
    expected = (loss(score, target, mask=mask) + loss(-score, target, mask=mask)) / 2
    torch.testing.assert_close(loss(*both, mask=mask), expected)


@named
def test_a_day_of_one_sample_and_a_constant_score_are_finite(loss: DayLoss) -> None:
    score = torch.zeros(2, 3, requires_grad=True)
    target = torch.tensor([[1.0, NAN, NAN], [1.0, 2.0, 3.0]])
    total, count = loss.sums(score, target)
    assert count.item() == 1
    total.backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()
    assert (score.grad[0] == 0).all()
    nothing = loss(score[:1], target[:1])
    assert nothing.item() == 0.0


@named
def test_it_wants_days_and_equal_shapes(loss: DayLoss) -> None:
    with pytest.raises(ValueError, match="order=day"):
        loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match="differ in shape"):
        loss(torch.zeros(2, 5, 1), torch.zeros(2, 5))


def test_temperatures_are_positive() -> None:
    for cls in (RankIC, ListNet):
        with pytest.raises(ValueError, match="temperature"):
            cls(0.0)
