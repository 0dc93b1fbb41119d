"""Describe a network to a reader: its layers and how many parameters each has."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

MAX_LAYERS = 12


def count_parameters(module: nn.Module, *, only_trained: bool = False) -> int:
    """Return the number of a module's parameters; lazy ones without a shape count 0."""
    return sum(
        p.numel()
        for p in module.parameters()
        if not isinstance(p, UninitializedParameter) and (p.requires_grad or not only_trained)
    )


def layer_rows(network: nn.Module) -> list[tuple[str, str, int]]:
    """Return name, class and number of parameters of the layers that the network consists of."""
    return [
        (name, type(layer).__name__, count_parameters(layer))
        for name, layer in network.named_children()
    ]


def describe_network(network: nn.Module) -> str:
    """Return the network's class, its number of parameters, and a line for each layer."""
    total, trained = count_parameters(network), count_parameters(network, only_trained=True)
    text = f"network {type(network).__name__}: {total:,} parameters"
    if trained != total:
        text += f", {trained:,} of them trained"
    rows = layer_rows(network)
    width = max((len(name) for name, *_ in rows), default=0)
    kind_width = max((len(kind) for _, kind, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {kind:<{kind_width}}  {n:>10,}" for name, kind, n in rows]
    if len(lines) > MAX_LAYERS:
        lines = [*lines[: MAX_LAYERS - 1], f"  and {len(lines) - MAX_LAYERS + 1} more layers"]
    return "\n".join([text, *lines])
