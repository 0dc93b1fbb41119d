"""One contract for every network: a new one is found and held to it by itself."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from network_inputs import NETWORKS, NUM_INSTRUMENTS, F, T, build, feed, real
from torch.func import functional_call

from qtorch.nn import MLP, StockMixer, Transformer
from qtorch.nn.network import Network
from qtorch.nn.stacked import stack_members, stacked_call

every = pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)
# Days whose instruments have weights of their own.
OF_A_UNIVERSE = [c for c in NETWORKS if c.cross_section and "instrument" in c.extras]
CONF = Path(__file__).parents[2] / "conf" / "model"
MOST_SECONDS = 5.0  # two where a machine is quiet; its busy caches cost as much again


@pytest.fixture(scope="module")
def compiler() -> None:
    """The compiler imported and warm, which is no network's own cost."""
    torch.compile(torch.nn.Tanh(), backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Each point of the contract costs a network little: seconds of work, whoever else works."""
    begun = time.thread_time()
    yield
    assert time.thread_time() - begun < MOST_SECONDS


def test_the_first_networks_are_found() -> None:
    assert {"MLP", "LSTM", "GRU", "Transformer"} <= {c.__name__ for c in NETWORKS}


def test_every_network_has_a_configuration() -> None:
    named = set()
    for path in CONF.glob("*.yaml"):
        network = yaml.safe_load(path.read_text()).get("network")
        if isinstance(network, dict):
            named.add(network["_target_"].rsplit(".", 1)[1])
    assert not {c.__name__ for c in NETWORKS} - named


@every
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("training", [True, False])
def test_shape_of_one_score_and_of_several(
    cls: type[Network], size: int | None, training: bool
) -> None:
    given = feed(cls, size=size)
    form = given["x"].shape[: 2 if cls.cross_section else 1]
    assert build(cls).train(training)(**given).shape == form
    assert build(cls, num_outputs=3).train(training)(**given).shape == (*form, 3)


@every
def test_every_parameter_gets_a_finite_gradient(cls: type[Network]) -> None:
    network, given = build(cls), feed(cls)
    real(cls, network(**given), given).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@every
@pytest.mark.parametrize("training", [True, False])
def test_holes_that_were_filled_give_finite_scores_and_gradients(
    cls: type[Network], training: bool
) -> None:
    """Zeros where values were missing: half of all, one column, one instrument, a whole day."""
    given = feed(cls)
    x = given["x"]
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    holes[..., 0] = holes[0] = holes[1, 0] = True
    given["x"] = x.masked_fill(holes, torch.nan).nan_to_num(0.0)
    network = build(cls).train(training)
    score = real(cls, network(**given), given)
    assert torch.isfinite(score).all()
    score.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


@every
def test_evaluation_is_deterministic_and_batches_do_not_matter(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    with torch.no_grad():
        whole = network(**given)
        assert torch.equal(whole, network(**given))
        assert torch.isfinite(real(cls, whole, given)).all()
        parts = [network(**{k: v[s] for k, v in given.items()}) for s in (slice(2), slice(2, None))]
        torch.testing.assert_close(
            real(cls, whole, given), real(cls, torch.cat(parts), given), rtol=1e-4, atol=1e-5
        )


@every
def test_the_order_of_time_is_seen(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    x = given["x"]
    turned = x.unflatten(-1, (F, T)).flip(-1).flatten(-2) if cls.inputs == "flat" else x.flip(-2)
    with torch.no_grad():
        assert not torch.allclose(network(**given), network(**{**given, "x": turned}))


@every
def test_the_order_of_the_samples_does_not_matter(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    axis = 1 if cls.cross_section else 0
    order = torch.randperm(given["x"].shape[axis], generator=torch.Generator().manual_seed(3))
    mixed = {k: v.index_select(axis, order) for k, v in given.items()}
    with torch.no_grad():
        expected = real(cls, network(**given).index_select(axis, order), mixed)
        found = real(cls, network(**mixed), mixed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", OF_A_UNIVERSE, ids=lambda cls: cls.__name__)
def test_who_an_instrument_is_matters_where_weights_are_its_own(cls: type[Network]) -> None:
    """The windows of a full day change places while the names stay: other scores, not the same
    ones in another place, as StockMixer's paper has it."""
    network, given = build(cls).eval(), feed(cls, size=NUM_INSTRUMENTS)
    order = torch.arange(NUM_INSTRUMENTS).roll(1)
    mixed = {k: v if k == "instrument" else v[:, order] for k, v in given.items()}
    with torch.no_grad():
        assert not torch.allclose(network(**mixed), network(**given)[:, order], atol=1e-3)


def test_the_networks_of_a_universe_are_found() -> None:
    assert StockMixer in OF_A_UNIVERSE


@pytest.mark.parametrize(
    "cls", [c for c in NETWORKS if c.cross_section], ids=lambda cls: cls.__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(cls: type[Network], training: bool) -> None:
    given = feed(cls)
    mask = given["mask"]
    junk = {k: v.clone() for k, v in given.items()}
    junk["x"][~mask] = 50.0
    if "concept" in junk:
        junk["concept"][~mask] = 1.0
    found, grads = [], []
    for each in (given, junk):
        network = build(cls, **_without_dropout(cls)).train(training)
        score = real(cls, network(**each), each)
        score.square().sum().backward()
        found.append(score.detach())
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@every
def test_functional_call_gives_the_same(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    expected = network(**given)
    for value in network.parameters():
        value.data.zero_()
    torch.testing.assert_close(functional_call(network, state, (), given), expected)


@every
@pytest.mark.parametrize("training", [True, False])
def test_stacked_members_equal_each_alone(cls: type[Network], training: bool) -> None:
    given = feed(cls)
    members = [build(cls, seed, **_without_dropout(cls)).train(training) for seed in range(3)]
    state = {k: v.detach().clone() for k, v in stack_members(members).items()}
    learnt = dict(members[0].named_parameters())
    for name, value in state.items():
        value.requires_grad_(name in learnt and learnt[name].requires_grad)
    found = stacked_call(members[0], state, **given)
    torch.stack([real(cls, f, given).square().sum() for f in found]).sum().backward()
    for k, member in enumerate(members):
        expected = member(**given)
        torch.testing.assert_close(
            real(cls, found[k], given), real(cls, expected, given), rtol=1e-4, atol=1e-5
        )
        real(cls, expected, given).square().sum().backward()
        for name, parameter in member.named_parameters():
            if parameter.grad is not None:
                grad = state[name].grad
                assert grad is not None, name
                torch.testing.assert_close(grad[k], parameter.grad, rtol=1e-3, atol=1e-4)
        for name, buffer in member.named_buffers():
            if name in state:
                torch.testing.assert_close(state[name][k], buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every
@pytest.mark.usefixtures("compiler")
def test_compiling_captures_it(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    compiled = torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled(**given), network(**given))
    torch._dynamo.reset()


@every
def test_bf16_autocast(cls: type[Network]) -> None:
    network, given = build(cls).eval(), feed(cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = real(cls, network(**given), given)
    assert torch.isfinite(rough).all()
    exact = real(cls, network(**given), given)
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)


@every
def test_config_builds_the_same_form_and_pickling_keeps_everything(cls: type[Network]) -> None:
    network = build(cls, num_outputs=2)
    config = dict(network.config)
    module, name = config.pop("_target_").rsplit(".", 1)
    twin = getattr(importlib.import_module(module), name)(**config)
    twin.load_state_dict(network.state_dict())
    copy = pickle.loads(pickle.dumps(network))
    given = feed(cls)
    expected = network.eval()(**given)
    for other in (twin, copy):
        torch.testing.assert_close(other.eval()(**given), expected)
        assert other.config == network.config


@every
def test_the_seed_decides_the_weights(cls: type[Network]) -> None:
    first, second = build(cls).state_dict(), build(cls).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def _without_dropout(cls: type[Network]) -> dict[str, float]:
    names = cls.__init__.__code__.co_varnames
    return {n: 0.0 for n in names if n.endswith("dropout")}


def test_a_training_batch_of_one_leaves_the_running_statistics_of_the_mlp() -> None:
    network = MLP(d_feat=3, layers=(4,)).train()
    before = {k: v.clone() for k, v in network.named_buffers()}
    network(torch.randn(1, 3)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in network.named_buffers())


def test_arguments_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="nhead"):
        Transformer(d_model=10, nhead=3)
    with pytest.raises(ValueError, match="LeakyReLU, SiLU"):
        MLP(act="relu")
    with pytest.raises(ValueError, match="num_outputs"):
        MLP(num_outputs=0)
    with pytest.raises(ValueError, match="1001 steps"):
        Transformer(d_feat=2, d_model=4)(torch.zeros(1, 1001, 2))
    with pytest.raises(TypeError):
        MLP(d_feat=3, hidden=4)
