"""List the layers of a network in order, for freezing and layer-wise learning rates."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_RECURRENT = re.compile(r"_l(\d+)(_reverse)?$")


def layer_groups(network: nn.Module) -> list[list[str]]:
    """Return the parameter names of each layer, in the order in which the network defines them.

    A layer is a module that owns parameters directly, a block of a Sequential or ModuleList, or
    one layer of a recurrent stack. The last layer is the head.
    """
    return [group for group in _iterate_groups(network, "") if group]


def _iterate_groups(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    own_names = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, nn.RNNBase):
        by_layer: dict[str, list[str]] = {}
        for name in own_names:
            match = _RECURRENT.search(name)
            by_layer.setdefault(match.group(1) if match else "", []).append(name)
        yield from by_layer.values()
    else:
        yield own_names
    is_block_list = isinstance(module, nn.Sequential | nn.ModuleList)
    for name, child in module.named_children():
        child_prefix = f"{prefix}{name}."
        if is_block_list:
            yield [child_prefix + n for n, _ in child.named_parameters()]
        else:
            yield from _iterate_groups(child, child_prefix)
