"""Layers of cross-sectional networks, compared with torch's layers and with explicit loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.core.errors import ConfigError
from qtorch.model.network_config import build_network, complete_network_config
from qtorch.nn import ADD, IGMTF, MASTER
from qtorch.nn.cross_section.add import reverse_gradient
from qtorch.nn.cross_section.hist import _attend_to_concepts
from qtorch.nn.cross_section.layers import (
    MaskCounts,
    MaskedBatchNorm,
    cosine_similarities,
    own_similarities,
)
from qtorch.nn.cross_section.stockmixer import (
    CausalLinear,
    InstrumentMixer,
    StockMixer,
    _DayNorm,
    _InstrumentWeights,
)


def test_cosine_similarities_equal_those_of_torch_and_have_their_gradient() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    expected = F.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    torch.testing.assert_close(cosine_similarities(x, y), expected, rtol=1e-5, atol=1e-5)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(cosine_similarities, (x, y))
    assert torch.autograd.gradcheck(lambda v: cosine_similarities(v, v), (x,))


def test_attention_to_concepts_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    state = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    member = torch.rand(2, 5, 4, dtype=torch.float64)
    is_empty = torch.tensor([[False] * 4, [False, True, False, False]])[:, None]
    member = member.masked_fill(is_empty, 0.0).requires_grad_()
    concept = member.transpose(1, 2) @ state
    similarity = F.cosine_similarity(state[:, :, None], concept[:, None], -1)
    share = similarity.masked_fill(is_empty, -torch.inf).softmax(-1)
    torch.testing.assert_close(
        _attend_to_concepts(state, member, is_empty), share @ concept, rtol=1e-4, atol=1e-5
    )
    assert torch.autograd.gradcheck(
        lambda state, member: _attend_to_concepts(state, member * ~is_empty, is_empty),
        (state, member),
    )
    zeros = _attend_to_concepts(state, torch.zeros_like(member), torch.ones_like(is_empty))
    assert not zeros.any()
    assert torch.isfinite(torch.autograd.grad(zeros.sum(), state)[0]).all()


def test_similarities_of_vectors_with_themselves_have_one_gradient() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 3)
    outputs = own_similarities(x)[0], cosine_similarities(x, x)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad((weight * y).sum(), x)[0] for y in outputs))


def test_a_zero_vector_has_cosine_zero_and_a_finite_gradient() -> None:
    x, y = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(1, 2, 3)
    cosine = cosine_similarities(x, y)
    assert (cosine == 0).all()
    cosine.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_masked_batch_norm_equals_batch_norm_of_the_unmasked_samples(training: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 5, 4, generator=g), torch.rand(3, 5, generator=g) > 0.4
    masked, plain = MaskedBatchNorm(4).train(training), nn.BatchNorm1d(4).train(training)
    for _ in range(2):
        torch.testing.assert_close(masked(x, mask)[mask], plain(x[mask]))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], value)


def test_masked_batch_norm_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    norm = MaskedBatchNorm(3).double()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *norm.parameters()]
    weight = torch.randn(2, 3, 3, dtype=torch.float64)
    rows = x[mask]
    scale = (rows.var(0, correction=0) + norm.eps).rsqrt()
    expected = (x - rows.mean(0)) * scale * norm.weight + norm.bias
    for counts in (mask, MaskCounts.from_mask(mask, torch.float64)):
        output = norm(x, counts)
        torch.testing.assert_close(output, expected)
        gradients, expected_gradients = (
            torch.autograd.grad((weight * y).sum(), leaves, retain_graph=True)
            for y in (output, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients)


def test_masked_batch_norm_uses_running_statistics_for_a_single_sample() -> None:
    norm = MaskedBatchNorm(2)
    norm.running_mean += 1.0
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = torch.randn(1, 3, 2, requires_grad=True)
    for count in (1, 0):
        output = norm(x, torch.arange(3)[None] < count)
        torch.testing.assert_close(output, (x - 1) / (1 + norm.eps) ** 0.5)
    output.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_reverse_gradient_scales_the_gradient_by_minus_alpha() -> None:
    x = torch.randn(4, requires_grad=True)
    assert torch.equal(reverse_gradient(x, 0.3), x)
    (reverse_gradient(x, 0.3) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * torch.arange(4.0))


@pytest.mark.parametrize("base", ["GRU", "LSTM"])
def test_disentangler_ignores_padding(base: str) -> None:
    torch.manual_seed(0)
    network = ADD(d_feat=3, hidden_size=4, num_layers=2, base_model=base, num_outputs=2)
    disentangler = network.disentangler()
    x, mask = torch.randn(2, 5, 6, 3), torch.arange(5) < torch.tensor([[5], [3]])
    outputs = []
    for filler in (0.0, 9.0):
        x = x.masked_fill(~mask[..., None, None], filler)
        outputs.append(disentangler(x, mask, network.encode(x), 0.5))
    assert [list(o.shape[2:]) for o in outputs[0]] == [[3], [3], [2], [6, 3]]
    for first, second in zip(*outputs, strict=True):
        torch.testing.assert_close(first[mask], second[mask])


def test_instrument_mixer_equals_dense_layers_over_a_full_universe() -> None:
    torch.manual_seed(0)
    mixer, x = InstrumentMixer(6, 3), torch.randn(2, 6, 5)
    nn.init.normal_(mixer.norm.weight)
    nn.init.normal_(mixer.norm.bias)
    states = F.hardswish(mixer.dense1(mixer.norm(x.transpose(1, 2))))
    expected = mixer.dense2(states).transpose(1, 2)
    order = torch.stack([torch.randperm(6) for _ in range(2)])
    permuted_x = x.gather(1, order[..., None].expand_as(x))
    output = mixer(permuted_x, torch.ones(2, 6, dtype=torch.bool), order)
    torch.testing.assert_close(output, expected.gather(1, order[..., None].expand_as(x)))


def test_the_norm_of_a_day_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    parts = [torch.randn(2, 5, width, dtype=torch.float64) for width in (3, 1, 1)]
    x, scale, shift = (part.requires_grad_() for part in parts)
    share = mask / mask.sum(1, keepdim=True, dtype=torch.float64)

    def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        scale, shift = (part * mask[..., None] for part in (scale, shift))
        result: Tensor = _DayNorm.apply(x, share, scale, shift, 1e-5)[0]
        return result

    day = x[1, :3]
    variance, mean = torch.var_mean(day, 0, correction=0)
    expected = (day - mean) * (variance + 1e-5).rsqrt() * scale[1, :3] + shift[1, :3]
    torch.testing.assert_close(normalize(x, scale, shift)[1, :3], expected)
    assert not normalize(x, scale, shift)[1, 3:].any()
    assert torch.autograd.gradcheck(normalize, (x, scale, shift))


def test_weights_of_instruments_are_looked_up_with_their_gradient() -> None:
    torch.manual_seed(0)
    shapes = (3, 6), (6,), (6,), (6,), (6, 3)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    instrument = torch.tensor([[0, 5, 2], [1, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def select_weights(*parts: Tensor) -> Tensor:
        result: Tensor = _InstrumentWeights.apply(instrument, mask, *parts)
        return result

    def select_without_padding(*parts: Tensor) -> Tensor:
        return select_weights(*parts)[mask]

    weights = select_weights(*parts)
    expected = torch.cat([parts[0][:, 5], *(p[5:6] for p in parts[1:4]), parts[4][5]])
    torch.testing.assert_close(weights[0, 1], expected)
    assert not weights[1, 2].any()
    assert torch.autograd.gradcheck(select_without_padding, parts)


def test_causal_linear_depends_on_no_later_step() -> None:
    torch.manual_seed(0)
    layer, x = CausalLinear(5), torch.randn(2, 5, 1, requires_grad=True)
    for t, value in enumerate(layer(x)[0]):
        grad = torch.autograd.grad(value, x, retain_graph=True)[0][0]
        assert (grad[: t + 1] != 0).all()
        assert (grad[t + 1 :] == 0).all()


def test_master_gates_features_by_the_market_columns() -> None:
    torch.manual_seed(0)
    small = {"d_model": 8, "t_nhead": 2, "s_nhead": 2}
    network = MASTER(d_feat=5, gate_input_start_index=3, beta=2.0, **small).eval()
    x, mask = torch.randn(2, 4, 6, 5), torch.ones(2, 4, dtype=torch.bool)
    weight = network._gate(x, mask)
    expected = 3 * torch.softmax(network.feature_gate(x[:, :, -1, 3:]) / 2.0, -1)
    torch.testing.assert_close(weight[:, :, 0], expected)
    # Only the gate uses the market columns, and only their newest step.
    changed_x = x.clone()
    changed_x[:, :, :-1, 3:] += 5.0
    torch.testing.assert_close(network(changed_x, mask), network(x, mask))
    changed_x[:, :, -1, 3:] += 5.0
    assert not torch.allclose(network(changed_x, mask), network(x, mask))
    plain = MASTER(d_feat=5, **small).eval()
    expected = 5 * torch.softmax(plain.feature_gate(x[:, :, -1].mean(1)) / 5.0, -1)
    torch.testing.assert_close(plain._gate(x, mask)[:, 0, 0], expected)
    for start, end in ((0, 5), (5, 5), (3, 6)):
        with pytest.raises(ValueError, match="gate's columns"):
            MASTER(d_feat=5, gate_input_start_index=start, gate_input_end_index=end)


def fill_bank(network: IGMTF, x: Tensor, mask: Tensor) -> IGMTF:
    """Write the days `x` to the bank of the network, two at a time."""
    network.reset_bank(len(x), x.shape[1])
    for start in range(0, len(x), 2):
        network.write_bank(start, x[start : start + 2], mask[start : start + 2])
    return network


@pytest.mark.parametrize(("k_day", "n_neighbor"), [(2, 3), (3, 4), (9, 99)])
def test_igmtf_equals_an_explicit_loop_over_days_and_neighbors(k_day: int, n_neighbor: int) -> None:
    torch.manual_seed(0)
    network = IGMTF(
        d_feat=3, hidden_size=4, num_layers=1, k_day=k_day, n_neighbor=n_neighbor
    ).eval()
    past, counts = torch.randn(5, 6, 4, 3), (6, 4, 5, 6, 3)
    fill_bank(network, past, torch.arange(6) < torch.tensor(counts)[:, None])
    today = torch.randn(1, 3, 4, 3)

    def state(x: Tensor) -> Tensor:
        return network.lins(network.rnn(x)[0][:, -1])

    bank, own = [state(x[:n]) for x, n in zip(past, counts, strict=True)], state(today[0])
    similarities = [
        nn.functional.cosine_similarity(own.mean(0), b.mean(0), dim=0).item() for b in bank
    ]
    days = sorted(range(5), key=lambda d: -similarities[d])[:k_day]
    candidates = network.project2(network.lins(torch.cat([bank[d] for d in days])))
    expected = []
    for instrument_state in own:
        similarity = nn.functional.cosine_similarity(
            network.project1(instrument_state)[None], candidates
        )
        order = similarity.argsort(descending=True)[:n_neighbor]
        neighbor_state = (similarity[order, None] * candidates[order]).sum(0) / n_neighbor
        expected.append(network.fc_out_pred(torch.cat((own[len(expected)], neighbor_state)))[0])
    scores = network(today, torch.ones(1, 3, dtype=torch.bool))[0]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_igmtf_with_a_filled_bank_passes_the_network_contract() -> None:
    torch.manual_seed(0)
    network = IGMTF(d_feat=3, hidden_size=4, num_layers=1, k_day=2, n_neighbor=3)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    x = torch.randn(3, 5, 4, 3)
    fill_bank(network, x, mask)
    garbage = x.masked_fill(~mask[..., None, None], 7.0)
    scores = [network(windows, mask)[mask] for windows in (x, garbage)]
    torch.testing.assert_close(*scores)
    scores[0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(x, mask)[mask].float(), scores[0], rtol=0.1, atol=0.1)
    copy = IGMTF(d_feat=3, hidden_size=4, num_layers=1, k_day=2, n_neighbor=3)
    copy.load_state_dict(network.state_dict())
    torch.testing.assert_close(copy(x, mask)[mask], scores[0])


def test_price_head_gives_the_return_of_a_price() -> None:
    """As in the authors' loss: (price - last close) / last close; 0 without a close."""
    torch.manual_seed(0)
    options = {"d_feat": 3, "step_len": 4, "num_instruments": 5, "num_outputs": 2}
    plain = StockMixer(**options)
    priced = StockMixer(**options, price_head=True, close_index=1)
    priced.load_state_dict(plain.state_dict())
    x = torch.rand(2, 5, 4, 3) + 0.5
    x[0, 2, -1, 1] = 0
    batch = {"mask": torch.ones(2, 5, dtype=torch.bool), "instrument": torch.arange(5).expand(2, 5)}
    price, score = plain(x, **batch), priced(x, **batch)
    close = x[:, :, -1, 1, None]
    expected = (price - close) / close
    expected[0, 2] = 0
    torch.testing.assert_close(score, expected)
    score.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in priced.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="close_column"):
        StockMixer(**options, price_head=True)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        StockMixer(**options, price_head=True, close_index=3)


def test_a_column_names_the_close() -> None:
    samples = SimpleNamespace(
        num_features=3,
        num_steps=4,
        label_names=("LABEL0",),
        extras={},
        instruments=range(5),
        calendar=range(9),
        horizon=None,
        feature_names=("OPEN", "CLOSE", "VOLUME"),
    )
    spec = {"_target_": "qtorch.nn.StockMixer", "price_head": True, "close_column": "CLOSE"}
    config = complete_network_config(spec, samples)
    assert config["close_index"] == 1
    assert build_network(config).close_index == 1
    with pytest.raises(ConfigError, match="Did you mean 'CLOSE'"):
        complete_network_config({**spec, "close_column": "CLOES"}, samples)
