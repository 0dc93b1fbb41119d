"""One contract for every network: a new one is found and held to it by itself."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
from torch.func import functional_call

import qtorch.nn
from qtorch.nn import MLP, Transformer
from qtorch.nn.network import Network

B, T, F = 5, 6, 4


def _networks() -> list[type[Network]]:
    found = set()
    for module in pkgutil.iter_modules(qtorch.nn.__path__):
        for _, thing in inspect.getmembers(importlib.import_module(f"qtorch.nn.{module.name}")):
            if inspect.isclass(thing) and issubclass(thing, Network) and thing is not Network:
                found.add(thing)
    return sorted(found, key=lambda c: c.__name__)


NETWORKS = _networks()


def _build(cls: type[Network], **arguments: object) -> Network:
    torch.manual_seed(0)
    return cls(d_feat=F * T if cls.inputs == "flat" else F, **arguments)


def _inputs(cls: type[Network], batch: int = B) -> torch.Tensor:
    x = torch.randn(batch, T, F, generator=torch.Generator().manual_seed(1))
    return x.transpose(1, 2).reshape(batch, F * T) if cls.inputs == "flat" else x


def test_the_first_networks_are_found() -> None:
    assert {"MLP", "LSTM", "GRU", "Transformer"} <= {c.__name__ for c in NETWORKS}


@pytest.mark.parametrize("cls", NETWORKS)
@pytest.mark.parametrize("batch", [B, 1])
@pytest.mark.parametrize("training", [True, False])
def test_shape_of_one_score_and_of_several(cls: type[Network], batch: int, training: bool) -> None:
    x = _inputs(cls, batch)
    assert _build(cls).train(training)(x).shape == (batch,)
    assert _build(cls, num_outputs=3).train(training)(x).shape == (batch, 3)


@pytest.mark.parametrize("cls", NETWORKS)
def test_every_parameter_gets_a_finite_gradient(cls: type[Network]) -> None:
    network = _build(cls)
    network(_inputs(cls)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("cls", NETWORKS)
def test_evaluation_is_deterministic_and_batches_do_not_matter(cls: type[Network]) -> None:
    network, x = _build(cls).eval(), _inputs(cls)
    with torch.no_grad():
        whole = network(x)
        assert torch.equal(whole, network(x))
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(whole, torch.cat([network(x[:2]), network(x[2:])]))


@pytest.mark.parametrize("cls", NETWORKS)
def test_the_order_of_time_is_seen(cls: type[Network]) -> None:
    network, x = _build(cls).eval(), _inputs(cls)
    with torch.no_grad():
        assert not torch.allclose(network(x), network(x.flip(1)))


@pytest.mark.parametrize("cls", NETWORKS)
def test_functional_call_gives_the_same(cls: type[Network]) -> None:
    network, x = _build(cls).eval(), _inputs(cls)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    expected = network(x)
    for value in network.parameters():
        value.data.zero_()
    torch.testing.assert_close(functional_call(network, state, (x,)), expected)


@pytest.mark.parametrize("cls", NETWORKS)
def test_bf16_autocast(cls: type[Network]) -> None:
    network, x = _build(cls).eval(), _inputs(cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(x)
    assert torch.isfinite(rough).all()
    torch.testing.assert_close(rough.float(), network(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("cls", NETWORKS)
def test_config_builds_the_same_form_and_pickling_keeps_everything(cls: type[Network]) -> None:
    network = _build(cls, num_outputs=2)
    config = dict(network.config)
    module, name = config.pop("_target_").rsplit(".", 1)
    twin = getattr(importlib.import_module(module), name)(**config)
    twin.load_state_dict(network.state_dict())
    copy = pickle.loads(pickle.dumps(network))
    x = _inputs(cls)
    expected = network.eval()(x)
    for other in (twin, copy):
        torch.testing.assert_close(other.eval()(x), expected)
        assert other.config == network.config


@pytest.mark.parametrize("cls", NETWORKS)
def test_the_seed_decides_the_weights(cls: type[Network]) -> None:
    first, second = _build(cls).state_dict(), _build(cls).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


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
