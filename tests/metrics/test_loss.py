from __future__ import annotations

import pytest
import torch

from qtorch.metrics.loss import LOSSES, MAE, MSE, Huber, Loss, mean_of

NAN = float("nan")


def test_values_by_hand() -> None:
    score, target = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 2.0])
    assert MSE()(score, target) == pytest.approx((0 + 4 + 9) / 3)
    assert MAE()(score, target) == pytest.approx((0 + 2 + 3) / 3)
    assert Huber(1.0)(score, target) == pytest.approx((0 + 1.5 + 2.5) / 3)


def test_weights_masks_and_missing_labels_by_hand() -> None:
    score = torch.tensor([1.0, 2.0, 5.0, 9.0], requires_grad=True)
    target = torch.tensor([0.0, 0.0, NAN, 0.0])
    weight = torch.tensor([1.0, 3.0, 100.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    loss = MSE()(score, target, weight, mask)
    assert loss.item() == pytest.approx((1 * 1 + 3 * 4) / 4)
    loss.backward()
    assert score.grad is not None
    torch.testing.assert_close(score.grad, torch.tensor([2 * 1 / 4, 3 * 4 / 4, 0.0, 0.0]))


def test_a_loss_of_ones_own_gives_the_elements_alone() -> None:
    class Cube(Loss):
        def elementwise(self, score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (score - target).abs() ** 3

    score, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, NAN])
    assert Cube()(score, target).item() == 1.0
    assert Cube().complete_sum(score, torch.zeros(2)).item() == 28.0


def test_a_missing_score_under_the_mask_does_not_spoil_the_gradient() -> None:
    score = torch.tensor([1.0, NAN], requires_grad=True)
    MAE()(score, torch.zeros(2), mask=torch.tensor([True, False])).backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


@pytest.mark.parametrize("loss", [cls() for cls in LOSSES.values()])
def test_sums_of_batches_make_the_mean_of_the_whole(loss: Loss) -> None:
    g = torch.Generator().manual_seed(0)
    score, target, weight = (torch.rand(11, 2, generator=g) for _ in range(3))
    target[3, 1] = NAN
    weight = weight[:, 0]
    parts = [loss.sums(score[k : k + 4], target[k : k + 4], weight[k : k + 4]) for k in (0, 4, 8)]
    total, share = (sum(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(mean_of(total, share), loss(score, target, weight))
    complete = torch.nan_to_num(target)
    torch.testing.assert_close(loss.complete_sum(score, complete), loss.sums(score, complete)[0])


@pytest.mark.parametrize("loss", [cls() for cls in LOSSES.values()])
def test_a_shape_mismatch_never_broadcasts(loss: Loss) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        loss(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="differ in shape"):
        loss.complete_sum(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="weight"):
        loss(torch.zeros(5), torch.zeros(5), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="mask"):
        loss(torch.zeros(5), torch.zeros(5), mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("loss", [cls() for cls in LOSSES.values()])
def test_a_batch_of_one_and_a_batch_without_labels(loss: Loss) -> None:
    score = torch.tensor([2.0], requires_grad=True)
    assert loss(score, torch.tensor([0.0])).dim() == 0
    nothing = loss(score, torch.tensor([NAN]))
    nothing.backward()
    assert nothing.item() == 0.0
    assert score.grad is not None
    assert score.grad.item() == 0.0


def test_half_precision_scores_are_compared_in_float32() -> None:
    loss = MSE()(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_delta_must_be_positive() -> None:
    with pytest.raises(ValueError, match="delta"):
        Huber(0.0)
