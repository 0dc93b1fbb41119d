"""Parts of the networks that see whole days, against torch's own and against loops by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn import ADD, IGMTF, MASTER
from qtorch.nn.add import reversed_gradient
from qtorch.nn.cross_section import MaskedBatchNorm
from qtorch.nn.stockmixer import CausalLinear, InstrumentMixer


@pytest.mark.parametrize("training", [True, False])
def test_a_masked_norm_is_torchs_over_what_is_there(training: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 5, 4, generator=g), torch.rand(3, 5, generator=g) > 0.4
    masked, plain = MaskedBatchNorm(4).train(training), nn.BatchNorm1d(4).train(training)
    for _ in range(2):
        torch.testing.assert_close(masked(x, mask)[mask], plain(x[mask]))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], value)


def test_a_masked_norm_of_one_sample_takes_the_running_statistics() -> None:
    norm = MaskedBatchNorm(2)
    norm.running_mean += 1.0
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = torch.randn(1, 3, 2, requires_grad=True)
    for count in (1, 0):
        found = norm(x, torch.arange(3)[None] < count)
        torch.testing.assert_close(found, (x - 1) / (1 + norm.eps) ** 0.5)
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_a_gradient_is_reversed() -> None:
    x = torch.randn(4, requires_grad=True)
    assert torch.equal(reversed_gradient(x, 0.3), x)
    (reversed_gradient(x, 0.3) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * torch.arange(4.0))


@pytest.mark.parametrize("base", ["GRU", "LSTM"])
def test_a_disentangler_does_not_see_padding(base: str) -> None:
    torch.manual_seed(0)
    network = ADD(d_feat=3, hidden_size=4, num_layers=2, base_model=base, num_outputs=2)
    beside = network.disentangler()
    x, mask = torch.randn(2, 5, 6, 3), torch.arange(5) < torch.tensor([[5], [3]])
    found = []
    for filler in (0.0, 9.0):
        x = x.masked_fill(~mask[..., None, None], filler)
        found.append(beside(x, mask, network.encode(x), 0.5))
    assert [list(f.shape[2:]) for f in found[0]] == [[3], [3], [2], [6, 3]]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first[mask], second[mask])


def test_a_whole_universe_is_mixed_as_by_layers_over_it() -> None:
    torch.manual_seed(0)
    mixer, x = InstrumentMixer(6, 3), torch.randn(2, 6, 5)
    nn.init.normal_(mixer.norm.weight)
    nn.init.normal_(mixer.norm.bias)
    states = F.hardswish(mixer.dense1(mixer.norm(x.transpose(1, 2))))
    expected = mixer.dense2(states).transpose(1, 2)
    order = torch.stack([torch.randperm(6) for _ in range(2)])
    mixed = x.gather(1, order[..., None].expand_as(x))
    found = mixer(mixed, torch.ones(2, 6, dtype=torch.bool), order)
    torch.testing.assert_close(found, expected.gather(1, order[..., None].expand_as(x)))


def test_stockmixer_mixes_time_causally() -> None:
    torch.manual_seed(0)
    layer, x = CausalLinear(5), torch.randn(2, 5, requires_grad=True)
    for t, value in enumerate(layer(x)[0]):
        grad = torch.autograd.grad(value, x, retain_graph=True)[0][0]
        assert (grad[: t + 1] != 0).all()
        assert (grad[t + 1 :] == 0).all()


def test_masters_market_weighs_its_features() -> None:
    torch.manual_seed(0)
    small = {"d_model": 8, "t_nhead": 2, "s_nhead": 2}
    network = MASTER(d_feat=5, gate_input_start_index=3, beta=2.0, **small).eval()
    x, mask = torch.randn(2, 4, 6, 5), torch.ones(2, 4, dtype=torch.bool)
    weight = network._gate(x, mask)
    expected = 3 * torch.softmax(network.feature_gate(x[:, :, -1, 3:]) / 2.0, -1)
    torch.testing.assert_close(weight[:, :, 0], expected)
    # Nothing else sees the market's columns, and of those but the newest.
    other = x.clone()
    other[:, :, :-1, 3:] += 5.0
    torch.testing.assert_close(network(other, mask), network(x, mask))
    other[:, :, -1, 3:] += 5.0
    assert not torch.allclose(network(other, mask), network(x, mask))
    plain = MASTER(d_feat=5, **small).eval()
    expected = 5 * torch.softmax(plain.feature_gate(x[:, :, -1].mean(1)) / 5.0, -1)
    torch.testing.assert_close(plain._gate(x, mask)[:, 0, 0], expected)
    for start, end in ((0, 5), (5, 5), (3, 6)):
        with pytest.raises(ValueError, match="gate's columns"):
            MASTER(d_feat=5, gate_input_start_index=start, gate_input_end_index=end)


def kept(network: IGMTF, x: Tensor, mask: Tensor) -> IGMTF:
    """The network with the days in its bank, two written at once."""
    network.reserve(len(x), x.shape[1])
    for start in range(0, len(x), 2):
        network.keep(start, x[start : start + 2], mask[start : start + 2])
    return network


@pytest.mark.parametrize(("k_day", "n_neighbor"), [(2, 3), (3, 4), (9, 99)])
def test_igmtf_looks_up_what_a_loop_by_hand_does(k_day: int, n_neighbor: int) -> None:
    torch.manual_seed(0)
    network = IGMTF(
        d_feat=3, hidden_size=4, num_layers=1, k_day=k_day, n_neighbor=n_neighbor
    ).eval()
    past, counts = torch.randn(5, 6, 4, 3), (6, 4, 5, 6, 3)
    kept(network, past, torch.arange(6) < torch.tensor(counts)[:, None])
    today = torch.randn(1, 3, 4, 3)

    def state(x: Tensor) -> Tensor:
        return network.lins(network.rnn(x)[0][:, -1])

    bank, own = [state(x[:n]) for x, n in zip(past, counts, strict=True)], state(today[0])
    alike = [nn.functional.cosine_similarity(own.mean(0), b.mean(0), dim=0).item() for b in bank]
    days = sorted(range(5), key=lambda d: -alike[d])[:k_day]
    others = network.project2(network.lins(torch.cat([bank[d] for d in days])))
    expected = []
    for one in own:
        near = nn.functional.cosine_similarity(network.project1(one)[None], others)
        order = near.argsort(descending=True)[:n_neighbor]
        met = (near[order, None] * others[order]).sum(0) / n_neighbor
        expected.append(network.fc_out_pred(torch.cat((own[len(expected)], met)))[0])
    found = network(today, torch.ones(1, 3, dtype=torch.bool))[0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_igmtf_with_a_bank_keeps_the_contract() -> None:
    torch.manual_seed(0)
    network = IGMTF(d_feat=3, hidden_size=4, num_layers=1, k_day=2, n_neighbor=3)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    x = torch.randn(3, 5, 4, 3)
    kept(network, x, mask)
    junk = x.masked_fill(~mask[..., None, None], 7.0)
    scores = [network(each, mask)[mask] for each in (x, junk)]
    torch.testing.assert_close(*scores)
    scores[0].sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(x, mask)[mask].float(), scores[0], rtol=0.1, atol=0.1)
    twin = IGMTF(d_feat=3, hidden_size=4, num_layers=1, k_day=2, n_neighbor=3)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(x, mask)[mask], scores[0])
