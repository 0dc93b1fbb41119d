"""Layers of TabNet compared with closed forms: sparsemax, ghost norm, selection prior."""

from __future__ import annotations

import pytest
import torch

from qtorch.nn import TabNet
from qtorch.nn.stacked import call_stacked_members, stack_members
from qtorch.nn.tabnet import MOMENTUM, GhostNorm, NormParts, sparsemax


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    scores = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projection = sparsemax(2 * scores)
    low, high = (2 * scores).amin(1) - 1, (2 * scores).amax(1)
    for _ in range(60):  # bisection for the threshold that gives a sum of one
        middle = (low + high) / 2
        is_sum_too_large = (2 * scores - middle[:, None]).clamp(min=0).sum(1) > 1
        low = torch.where(is_sum_too_large, middle, low)
        high = torch.where(is_sum_too_large, high, middle)
    torch.testing.assert_close(projection, (2 * scores - low[:, None]).clamp(min=0))
    assert (projection == 0).any()
    assert torch.autograd.gradcheck(sparsemax, (scores[:4].requires_grad_(),))
    torch.testing.assert_close(sparsemax(torch.full((1, 4), 1e4)), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("sizes", [(4, 4, 3), (3, 3, 3)])
def test_ghost_norm_normalizes_parts_of_a_batch_separately(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 3)
    norm, expected_norm = GhostNorm(3, vbs=3), torch.nn.BatchNorm1d(3, momentum=MOMENTUM)
    for parameter, expected_parameter in zip(
        norm.parameters(), expected_norm.parameters(), strict=True
    ):
        torch.nn.init.uniform_(parameter)
        expected_parameter.data.copy_(parameter.data)
    parts = NormParts.of_batch(norm, len(x))
    assert parts.is_alternating == (sizes == (3, 3, 3))
    output = parts.separate(norm(parts.alternate(x), parts))
    parts.update_statistics()
    expected = torch.cat([expected_norm(part) for part in torch.split(x, sizes)])
    torch.testing.assert_close(output, expected)
    for values, expected_values in zip(norm.buffers(), expected_norm.buffers(), strict=True):
        torch.testing.assert_close(values, expected_values)
    weight = torch.randn_like(x)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for parameter, expected_parameter in zip(
        norm.parameters(), expected_norm.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected_parameter.grad)


def test_a_batch_of_one_sample_is_normalized_by_the_running_statistics() -> None:
    x, norm = torch.randn(1, 3), GhostNorm(3, vbs=3)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    output = norm(x, NormParts.of_batch(norm, 1))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    torch.testing.assert_close(output, norm.eval()(x, NormParts.of_batch(norm, 1)))


def test_stacked_members_normalize_the_same_parts_as_single_ones() -> None:
    torch.manual_seed(0)
    members = [TabNet(d_feat=5, n_d=4, n_a=4, out_dim=4, n_steps=3, vbs=4) for _ in range(2)]
    state, x = stack_members(members), torch.randn(12, 5)
    outputs = call_stacked_members(members[0], state, x)
    torch.testing.assert_close(outputs, torch.stack([member(x) for member in members]))
    for name, buffer in members[1].named_buffers():
        torch.testing.assert_close(state[name][1], buffer)


def test_each_norm_counts_its_parts_of_a_training_batch() -> None:
    network = TabNet(d_feat=5, n_d=4, n_a=4, out_dim=4, n_steps=3, vbs=3)
    decoder = network.decoder()
    for size in (11, 4, 1):  # three parts, one, and a sample that is not counted
        decoder(network.encode(torch.randn(size, 5))[0])
    network.eval()(torch.randn(11, 5))
    for module in (network, decoder):
        counts = {k: int(v) for k, v in module.named_buffers() if k.endswith("batches_tracked")}
        assert {k: v for k, v in counts.items() if v != 4} == (
            {"bn.num_batches_tracked": 2} if module is network else {}
        )


@pytest.mark.parametrize("relax", [1.0, 1.5, None])
def test_selected_features_get_a_lower_prior_in_later_steps(relax: float | None) -> None:
    torch.manual_seed(0)
    network = TabNet(d_feat=5, n_d=4, n_a=4, out_dim=4, n_steps=4, relax=relax, vbs=64)
    attention_calls = []
    for step in network.steps:
        step.atten_tran.register_forward_hook(
            lambda _, inputs, output: attention_calls.append((inputs[1], output))
        )
    network.encode(torch.randn(20, 5))
    expected = torch.ones(20, 5)
    for prior, selection in attention_calls:
        prior = torch.ones(20, 5) if prior is None else prior
        torch.testing.assert_close(prior, expected)
        torch.testing.assert_close(selection.sum(-1), torch.ones(20))
        expected = expected if relax is None else expected * (relax - selection)


def test_prior_scales_the_attention_logits() -> None:
    torch.manual_seed(0)
    network = TabNet(d_feat=5, n_d=4, n_a=4, out_dim=4, vbs=64).eval()
    attention_input, prior = torch.randn(6, 4), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    attention = network.steps[0].atten_tran
    parts = NormParts.of_batch(network, 6)
    logits = attention.bn(attention.fc(attention_input), parts) * prior
    selection = attention(attention_input, prior, None, parts)
    torch.testing.assert_close(selection, sparsemax(logits))
    encoding = network.encode(torch.randn(6, 5), prior.expand(6, 5))[0]
    assert network.decoder().eval()(encoding).shape == (6, 5)


def test_invalid_arguments_raise_errors() -> None:
    with pytest.raises(ValueError, match="n_steps is 1"):
        TabNet(d_feat=5, n_steps=1)
    with pytest.raises(ValueError, match=r"relax is 0\.5"):
        TabNet(d_feat=5, relax=0.5)
    with pytest.raises(ValueError, match="vbs is 1"):
        TabNet(d_feat=5, vbs=1)
