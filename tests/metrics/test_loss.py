from __future__ import annotations

import pytest
import torch

from qtorch.metrics.loss import (
    MAE,
    MSE,
    BaseLoss,
    Combined,
    CrossEntropy,
    Huber,
    LabeledScores,
    Loss,
    Pairwise,
    Quantile,
    has_label,
    mean_from_sums,
    takes_labeled_scores,
)

NAN = float("nan")
ELEMENTWISE = [MSE(), MAE(), Huber(), Quantile(0.3)]


def test_losses_by_hand() -> None:
    score, target = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 2.0])
    assert MSE()(score, target) == pytest.approx((0 + 4 + 9) / 3)
    assert MAE()(score, target) == pytest.approx((0 + 2 + 3) / 3)
    assert Huber(1.0)(score, target) == pytest.approx((0 + 1.5 + 2.5) / 3)


def test_weights_mask_and_nan_labels_by_hand() -> None:
    score = torch.tensor([1.0, 2.0, 5.0, 9.0], requires_grad=True)
    target = torch.tensor([0.0, 0.0, NAN, 0.0])
    weight = torch.tensor([1.0, 3.0, 100.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    loss = MSE()(score, target, weight, mask)
    assert loss.item() == pytest.approx((1 * 1 + 3 * 4) / 4)
    loss.backward()
    assert score.grad is not None
    torch.testing.assert_close(score.grad, torch.tensor([2 * 1 / 4, 3 * 4 / 4, 0.0, 0.0]))


def test_custom_loss_only_needs_elementwise() -> None:
    class Cube(Loss):
        def elementwise(self, score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (score - target).abs() ** 3

    score, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, NAN])
    assert Cube()(score, target).item() == 1.0
    total, count = Cube().sums(score, torch.zeros(2), complete=True)
    assert (total.item(), count) == (28.0, 2)


def test_missing_labels_count_nothing_in_a_loss_derived_from_another() -> None:
    class Shifted(MSE):
        def compute(self, score: torch.Tensor, target: torch.Tensor, reduction: str):
            return super().compute(score + 1, target, reduction)

    score, target = torch.zeros(3), torch.tensor([0.0, NAN, NAN])
    assert Shifted()(score, target) == 1.0


def test_masked_nan_score_keeps_the_gradient_finite() -> None:
    score = torch.tensor([1.0, NAN], requires_grad=True)
    MAE()(score, torch.zeros(2), mask=torch.tensor([True, False])).backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


@pytest.mark.parametrize("loss", ELEMENTWISE)
def test_batch_sums_add_up_to_the_mean(loss: Loss) -> None:
    g = torch.Generator().manual_seed(0)
    score, target, weight = (torch.rand(11, 2, generator=g) for _ in range(3))
    target[3, 1] = NAN
    weight = weight[:, 0]
    parts = [loss.sums(score[k : k + 4], target[k : k + 4], weight[k : k + 4]) for k in (0, 4, 8)]
    total, share = (sum(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(mean_from_sums(total, share), loss(score, target, weight))
    complete = torch.nan_to_num(target)
    fast, slow = loss.sums(score, complete, complete=True), loss.sums(score, complete)
    assert [float(v) for v in fast] == pytest.approx([float(v) for v in slow], rel=1e-6)


@pytest.mark.parametrize("loss", ELEMENTWISE)
def test_shape_mismatch_is_rejected(loss: Loss) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        loss(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="differ in shape"):
        loss.sums(torch.zeros(5, 1), torch.zeros(5), complete=True)
    with pytest.raises(ValueError, match="weight"):
        loss(torch.zeros(5), torch.zeros(5), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="mask"):
        loss(torch.zeros(5), torch.zeros(5), mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("loss", ELEMENTWISE)
def test_batch_of_one_and_batch_without_labels(loss: Loss) -> None:
    score = torch.tensor([2.0], requires_grad=True)
    assert loss(score, torch.tensor([0.0])).dim() == 0
    empty_loss = loss(score, torch.tensor([NAN]))
    empty_loss.backward()
    assert empty_loss.item() == 0.0
    assert score.grad is not None
    assert score.grad.item() == 0.0


def test_half_precision_scores_use_float32() -> None:
    loss = MSE()(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_non_positive_delta_is_rejected() -> None:
    with pytest.raises(ValueError, match="delta"):
        Huber(0.0)


def test_quantile_loss_is_minimal_at_the_quantile() -> None:
    labels = torch.arange(101.0)
    losses = [Quantile(0.8)(torch.full_like(labels, guess), labels).item() for guess in range(101)]
    assert min(range(101), key=losses.__getitem__) == 80
    with pytest.raises(ValueError, match="tau"):
        Quantile(1.0)


def test_cross_entropy_by_hand() -> None:
    loss = CrossEntropy(edges=[-1.0, 1.0])
    score = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 0.0]], requires_grad=True)
    target = torch.tensor([-3.0, 0.5, NAN])
    expected = (-torch.log_softmax(score.detach()[0], 0)[0] + torch.log(torch.tensor(3.0))) / 2
    value = loss(score, target)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert score.grad is not None
    assert torch.equal(score.grad[2], torch.zeros(3))
    assert loss.num_outputs(1) == 3
    with pytest.raises(ValueError, match="num_outputs=3"):
        loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="ascend"):
        CrossEntropy(edges=[1.0, 0.0])


def test_cross_entropy_readout_is_the_expected_bin() -> None:
    loss = CrossEntropy(num_bins=5)
    assert loss.edges.tolist() == pytest.approx([-0.8416, -0.2533, 0.2533, 0.8416], abs=1e-4)
    logits = 50.0 * torch.eye(5)
    assert loss.readout(logits).tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])


def test_combined_loss_is_the_weighted_sum() -> None:
    g = torch.Generator().manual_seed(0)
    score, target = torch.rand(7, generator=g), torch.rand(7, generator=g)
    target[2] = NAN
    combined = Combined([(MSE(), 2.0), (MAE(), 0.5)])
    expected = 2 * MSE()(score, target) + 0.5 * MAE()(score, target)
    torch.testing.assert_close(combined(score, target), expected)
    with pytest.raises(ValueError, match="at least one"):
        Combined([])
    pair = torch.rand(4, 2, generator=g), torch.rand(4, 2, generator=g)
    total, count = combined.sums(*pair, complete=True)
    assert count == 8
    torch.testing.assert_close(total / count, combined(*pair))


class HalfOfElements(BaseLoss):
    """The mean error of every second element: a loss with sums of its own."""

    def sums(
        self,
        score: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *,
        complete: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        error = (score - target)[..., ::2].nan_to_num()
        return error.sum(), error.numel()


@pytest.mark.parametrize("complete", [False, True])
def test_parts_of_a_combined_loss_search_for_labels_once(
    complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    score = torch.randn(3, 6, requires_grad=True)
    target = torch.randn(3, 6)
    if not complete:
        target[0, 1:4], target[2] = torch.nan, torch.nan
    parts: list[tuple[BaseLoss, float]] = [
        (MSE(), 1.0),
        (Pairwise(), 0.1),
        (Quantile(0.3), 2.0),
        (HalfOfElements(), 0.5),
    ]
    expected = torch.stack([share * part(score, target) for part, share in parts]).sum()
    searches = []
    monkeypatch.setattr(
        "qtorch.metrics.loss.has_label",
        lambda target, mask: searches.append(1) or has_label(target, mask),
    )
    total, count = Combined(parts).sums(score, target, complete=complete)
    assert len(searches) == 1  # of the pairs, if no label is missing
    assert int(count) == (18 if complete else 9)
    torch.testing.assert_close(total / count, expected)
    gradients = [torch.autograd.grad(value, score)[0] for value in (total / count, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "loss", [*ELEMENTWISE, Pairwise(), Combined([(MSE(), 1.0), (Pairwise(), 0.5), (MAE(), 2.0)])]
)
@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_known_number_of_labels_changes_neither_loss_nor_gradient(
    loss: BaseLoss, num_labels: int
) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    score = torch.randn(2, 5, num_labels, requires_grad=True)
    target = torch.randn(2, 5, num_labels).masked_fill(~mask[..., None], NAN)
    assert takes_labeled_scores(loss)
    labeled = LabeledScores(score, target, None, mask, num_labels=8 * num_labels)
    sums = loss.compute_sums(labeled)
    expected_sums = loss.sums(score, target, None, mask)
    gradients = []
    for total, weight in (sums, expected_sums):
        mean = total / weight
        gradients.append(torch.autograd.grad(mean, score)[0])
        torch.testing.assert_close(total, expected_sums[0])
        assert float(weight) == float(expected_sums[1])
    torch.testing.assert_close(*gradients)


def test_a_loss_with_sums_of_its_own_is_not_computed_from_labeled_scores() -> None:
    assert not takes_labeled_scores(CrossEntropy())
    assert not takes_labeled_scores(Combined([(MSE(), 1.0), (CrossEntropy(), 1.0)]))
    assert not takes_labeled_scores(torch.nn.MSELoss())
