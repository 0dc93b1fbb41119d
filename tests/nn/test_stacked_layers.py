"""Chains of layers for several members compute what vmap computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from qtorch.nn import LSTM, MLP
from qtorch.nn.recurrent import GRULayers
from qtorch.nn.stacked import member_dropout, mix_keys, stack_members, use_stacked_layers
from qtorch.nn.stacked_layers import StackedLayers

NUM_MEMBERS, NUM_ROWS, NUM_INPUTS = 3, 17, 5
KEYS = mix_keys(torch.tensor([1, 2, 3]), torch.tensor([4, 4, 5]))


def build_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of members with weights of their own."""
    members = []
    for seed in range(NUM_MEMBERS):
        torch.manual_seed(seed)
        members.append(type(network)(**network.arguments))
    return {name: t.detach().clone() for name, t in stack_members(members).items()}


def vmap_scores(network: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    def call(values: dict[str, Tensor], inputs: Tensor, key: Tensor) -> Any:
        with member_dropout(key):
            return functional_call(network, values, (inputs,))

    scores: Tensor = vmap(call)(state, x, KEYS)
    return scores


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": [4]},
        {"layers": [8, 6], "act": "SiLU", "dropout": 0.3},
        {"layers": [4], "num_outputs": 2, "dropout": 1.0},
    ],
)
def test_a_chain_of_layers_equals_vmap(arguments: dict[str, Any], is_training: bool) -> None:
    network = MLP(d_feat=NUM_INPUTS, **arguments).train(is_training)
    layers = StackedLayers.from_network(network)
    assert layers is not None
    assert layers.has_dropout == (network.layers[0].p > 0)
    x = torch.randn(NUM_MEMBERS, NUM_ROWS, NUM_INPUTS)
    results = []
    for call in (layers, lambda state, x, _: vmap_scores(network, state, x)):
        state = build_state(network)
        for name, tensor in state.items():
            tensor.requires_grad_(tensor.is_floating_point() and "running" not in name)
        trained = [t for t in state.values() if t.requires_grad]
        scores = call(state, x, KEYS)
        gradients = torch.autograd.grad(scores.square().sum(), trained)
        buffers = [t for t in state.values() if not t.requires_grad]
        results.append((scores, *gradients, *buffers))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)


def test_a_training_batch_of_one_sample_uses_the_running_statistics() -> None:
    network = MLP(d_feat=NUM_INPUTS, layers=[4], dropout=0.0)
    layers = StackedLayers.from_network(network)
    assert layers is not None
    state, x = build_state(network), torch.randn(NUM_MEMBERS, 1, NUM_INPUTS)
    expected = vmap(lambda values, inputs: functional_call(network, values, (inputs,)))(state, x)
    torch.testing.assert_close(layers(state, x, None), expected)


class Doubled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_only_a_class_that_declares_its_chain_is_computed_as_one() -> None:
    assert StackedLayers.from_network(Doubled(d_feat=4)) is None
    assert StackedLayers.from_network(LSTM(d_feat=4)) is None
    hooked = MLP(d_feat=4)
    hooked.layers[1].register_forward_hook(lambda *values: None)
    assert StackedLayers.from_network(hooked) is None
    other = MLP(d_feat=4)
    other.layers[2] = nn.LayerNorm(256)
    assert StackedLayers.from_network(other) is None


@pytest.mark.parametrize("is_shared", [False, True])
def test_stacked_gru_layers_equal_those_of_torch(is_shared: bool) -> None:
    torch.manual_seed(0)
    layers = [GRULayers(NUM_INPUTS, 4, num_layers=2) for _ in range(NUM_MEMBERS)]
    state = {name: t.detach().requires_grad_() for name, t in stack_members(layers).items()}
    x = torch.randn(NUM_MEMBERS, 7, 6, NUM_INPUTS)
    first = torch.randn(NUM_MEMBERS, 2, 7, 4, requires_grad=True)
    x = x[0].expand_as(x) if is_shared else x.requires_grad_()

    def call(values: dict[str, Tensor], inputs: Tensor, initial: Tensor) -> Any:
        return functional_call(layers[0], values, (inputs, initial))

    with use_stacked_layers():
        dims = (0, None, 0) if is_shared else (0, 0, 0)
        outputs, last = vmap(call, dims)(state, x[0] if is_shared else x, first)
    inputs = [*state.values(), first, *([] if is_shared else [x])]
    gradients = torch.autograd.grad((outputs.square().sum(), last.sum()), inputs)
    for k, layer in enumerate(layers):
        initial, rows = (t[k].detach().requires_grad_() for t in (first, x))
        own_outputs, own_last = layer(rows, initial)
        torch.testing.assert_close(outputs[k], own_outputs)
        torch.testing.assert_close(last[k], own_last)
        own_inputs = [*layer.parameters(), initial, *([] if is_shared else [rows])]
        own_sums = (own_outputs.square().sum(), own_last.sum())
        own_gradients = torch.autograd.grad(own_sums, own_inputs)
        for expected, gradient in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(gradient[k], expected, rtol=1e-4, atol=1e-5)
