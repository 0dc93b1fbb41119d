"""The contract that every network must pass; new networks are discovered automatically."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from network_inputs import (
    NETWORKS,
    NUM_INSTRUMENTS,
    F,
    T,
    build_inputs,
    build_network,
    drop_padding,
)
from torch.func import functional_call

from qtorch.nn import MLP, StockMixer, Transformer
from qtorch.nn.network import Network
from qtorch.nn.stacked import call_stacked_members, stack_members

parametrize_networks = pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)
# Networks with separate weights for each instrument of a fixed universe.
UNIVERSE_NETWORKS = [c for c in NETWORKS if c.cross_section and "instrument" in c.extras]
CONF = Path(__file__).parents[2] / "conf" / "model"
MAX_SECONDS = 5.0  # about two on an idle machine, and twice as much on a busy one


@pytest.fixture(scope="module")
def warm_compiler() -> None:
    """Import and warm up the compiler, so that its start does not count as time of a network."""
    torch.compile(torch.nn.Tanh(), backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def limit_cpu_time() -> Iterator[None]:
    """Fail a test that takes more than MAX_SECONDS of CPU time in this thread."""
    start = time.thread_time()
    yield
    assert time.thread_time() - start < MAX_SECONDS


def test_basic_networks_are_discovered() -> None:
    assert {"MLP", "LSTM", "GRU", "Transformer"} <= {c.__name__ for c in NETWORKS}


def test_every_network_has_a_configuration() -> None:
    configured_names = set()
    for path in CONF.glob("*.yaml"):
        network = yaml.safe_load(path.read_text()).get("network")
        if isinstance(network, dict):
            configured_names.add(network["_target_"].rsplit(".", 1)[1])
    assert not {c.__name__ for c in NETWORKS} - configured_names


@parametrize_networks
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("training", [True, False])
def test_output_shape_for_one_and_several_outputs(
    cls: type[Network], size: int | None, training: bool
) -> None:
    inputs = build_inputs(cls, size=size)
    shape = inputs["x"].shape[: 2 if cls.cross_section else 1]
    assert build_network(cls).train(training)(**inputs).shape == shape
    assert build_network(cls, num_outputs=3).train(training)(**inputs).shape == (*shape, 3)


@parametrize_networks
def test_gradients_of_all_parameters_are_finite(cls: type[Network]) -> None:
    network, inputs = build_network(cls), build_inputs(cls)
    drop_padding(cls, network(**inputs), inputs).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@parametrize_networks
@pytest.mark.parametrize("training", [True, False])
def test_filled_missing_values_give_finite_scores_and_gradients(
    cls: type[Network], training: bool
) -> None:
    """Missing values are filled with zeros: half of all, a column, an instrument, a whole day."""
    inputs = build_inputs(cls)
    x = inputs["x"]
    is_missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    is_missing[..., 0] = is_missing[0] = is_missing[1, 0] = True
    inputs["x"] = x.masked_fill(is_missing, torch.nan).nan_to_num(0.0)
    network = build_network(cls).train(training)
    score = drop_padding(cls, network(**inputs), inputs)
    assert torch.isfinite(score).all()
    score.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


@parametrize_networks
def test_evaluation_is_deterministic_and_independent_of_batching(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    with torch.no_grad():
        full_batch = network(**inputs)
        assert torch.equal(full_batch, network(**inputs))
        assert torch.isfinite(drop_padding(cls, full_batch, inputs)).all()
        halves = [{k: v[s] for k, v in inputs.items()} for s in (slice(2), slice(2, None))]
        parts = torch.cat([network(**half) for half in halves])
    scores = (drop_padding(cls, outputs, inputs) for outputs in (full_batch, parts))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


@parametrize_networks
def test_scores_depend_on_the_order_of_steps(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    x = inputs["x"]
    reversed_x = (
        x.unflatten(-1, (F, T)).flip(-1).flatten(-2) if cls.inputs == "flat" else x.flip(-2)
    )
    with torch.no_grad():
        assert not torch.allclose(network(**inputs), network(**{**inputs, "x": reversed_x}))


@parametrize_networks
def test_scores_do_not_depend_on_the_order_of_samples(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    axis = 1 if cls.cross_section else 0
    order = torch.randperm(inputs["x"].shape[axis], generator=torch.Generator().manual_seed(3))
    permuted_inputs = {k: v.index_select(axis, order) for k, v in inputs.items()}
    with torch.no_grad():
        expected = drop_padding(cls, network(**inputs).index_select(axis, order), permuted_inputs)
        scores = drop_padding(cls, network(**permuted_inputs), permuted_inputs)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", UNIVERSE_NETWORKS, ids=lambda cls: cls.__name__)
def test_universe_networks_depend_on_the_identity_of_instruments(cls: type[Network]) -> None:
    """Permuting the windows of a full day, but not the instruments, changes the scores instead of
    only permuting them (as in StockMixer's paper)."""
    network, inputs = build_network(cls).eval(), build_inputs(cls, size=NUM_INSTRUMENTS)
    order = torch.arange(NUM_INSTRUMENTS).roll(1)
    permuted_inputs = {k: v if k == "instrument" else v[:, order] for k, v in inputs.items()}
    with torch.no_grad():
        assert not torch.allclose(
            network(**permuted_inputs), network(**inputs)[:, order], atol=1e-3
        )


def test_stockmixer_is_a_universe_network() -> None:
    assert StockMixer in UNIVERSE_NETWORKS


@pytest.mark.parametrize(
    "cls", [c for c in NETWORKS if c.cross_section], ids=lambda cls: cls.__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_scores_or_gradients(cls: type[Network], training: bool) -> None:
    inputs = build_inputs(cls)
    mask = inputs["mask"]
    garbage = {k: v.clone() for k, v in inputs.items()}
    garbage["x"][~mask] = 50.0
    if "concept" in garbage:
        garbage["concept"][~mask] = 1.0
    scores, grads = [], []
    for batch in (inputs, garbage):
        network = build_network(cls, **_zero_dropout_arguments(cls)).train(training)
        score = drop_padding(cls, network(**batch), batch)
        score.square().sum().backward()
        scores.append(score.detach())
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@parametrize_networks
def test_functional_call_gives_the_same_scores(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    expected = network(**inputs)
    for value in network.parameters():
        value.data.zero_()
    torch.testing.assert_close(functional_call(network, state, (), inputs), expected)


@parametrize_networks
@pytest.mark.parametrize("training", [True, False])
def test_stacked_members_equal_separate_members(cls: type[Network], training: bool) -> None:
    inputs = build_inputs(cls)
    members = [
        build_network(cls, seed, **_zero_dropout_arguments(cls)).train(training)
        for seed in range(3)
    ]
    state = {k: v.detach().clone() for k, v in stack_members(members).items()}
    parameters = dict(members[0].named_parameters())
    for name, value in state.items():
        value.requires_grad_(name in parameters and parameters[name].requires_grad)
    stacked_scores = call_stacked_members(members[0], state, **inputs)
    scores = [drop_padding(cls, s, inputs) for s in stacked_scores]
    torch.stack([s.square().sum() for s in scores]).sum().backward()
    for k, member in enumerate(members):
        expected = drop_padding(cls, member(**inputs), inputs)
        torch.testing.assert_close(scores[k], expected, rtol=1e-4, atol=1e-5)
        expected.square().sum().backward()
        for name, parameter in member.named_parameters():
            if parameter.grad is not None:
                grad = state[name].grad
                assert grad is not None, name
                torch.testing.assert_close(grad[k], parameter.grad, rtol=1e-3, atol=1e-4)
        for name, buffer in member.named_buffers():
            if name in state:
                torch.testing.assert_close(state[name][k], buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@parametrize_networks
@pytest.mark.usefixtures("warm_compiler")
def test_compiled_network_gives_the_same_scores(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    compiled_network = torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled_network(**inputs), network(**inputs))
    torch._dynamo.reset()


@parametrize_networks
def test_bf16_autocast_approximates_float32(cls: type[Network]) -> None:
    network, inputs = build_network(cls).eval(), build_inputs(cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_scores = drop_padding(cls, network(**inputs), inputs)
    assert torch.isfinite(rounded_scores).all()
    exact_scores = drop_padding(cls, network(**inputs), inputs)
    torch.testing.assert_close(rounded_scores.float(), exact_scores, atol=0.1, rtol=0.1)


@parametrize_networks
def test_bf16_autocast_has_finite_gradients_in_single_precision(cls: type[Network]) -> None:
    network, inputs = build_network(cls).train(), build_inputs(cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = drop_padding(cls, network(**inputs), inputs)
    score.float().square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


@parametrize_networks
def test_config_and_pickle_restore_the_network(cls: type[Network]) -> None:
    network = build_network(cls, num_outputs=2)
    config = dict(network.config)
    module, name = config.pop("_target_").rsplit(".", 1)
    rebuilt_network = getattr(importlib.import_module(module), name)(**config)
    rebuilt_network.load_state_dict(network.state_dict())
    unpickled_network = pickle.loads(pickle.dumps(network))
    inputs = build_inputs(cls)
    expected = network.eval()(**inputs)
    for restored_network in (rebuilt_network, unpickled_network):
        torch.testing.assert_close(restored_network.eval()(**inputs), expected)
        assert restored_network.config == network.config


@parametrize_networks
def test_weights_are_reproducible_with_a_seed(cls: type[Network]) -> None:
    first, second = build_network(cls).state_dict(), build_network(cls).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def _zero_dropout_arguments(cls: type[Network]) -> dict[str, float]:
    names = cls.__init__.__code__.co_varnames
    return {n: 0.0 for n in names if n.endswith("dropout")}


def test_mlp_training_batch_of_one_sample_keeps_running_statistics() -> None:
    network = MLP(d_feat=3, layers=(4,)).train()
    before = {k: v.clone() for k, v in network.named_buffers()}
    network(torch.randn(1, 3)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in network.named_buffers())


def test_invalid_arguments_raise_errors() -> None:
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
