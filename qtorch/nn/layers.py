"""A network's layers from its input to its output: for freezing and for rates by depth."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_RECURRENT = re.compile(r"_l(\d+)(_reverse)?$")


def layer_groups(network: nn.Module) -> list[list[str]]:
    """Parameter names by layer, in the order in which the network defines them.

    A layer is a module with parameters of its own, a whole block of a Sequential or ModuleList,
    and each layer of a recurrent stack. The last is the head.
    """
    return [group for group in _groups(network, "") if group]


def _groups(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, nn.RNNBase):
        by_layer: dict[str, list[str]] = {}
        for name in own:
            found = _RECURRENT.search(name)
            by_layer.setdefault(found.group(1) if found else "", []).append(name)
        yield from by_layer.values()
    else:
        yield own
    whole = isinstance(module, nn.Sequential | nn.ModuleList)
    for name, child in module.named_children():
        start = f"{prefix}{name}."
        if whole:
            yield [start + n for n, _ in child.named_parameters()]
        else:
            yield from _groups(child, start)
