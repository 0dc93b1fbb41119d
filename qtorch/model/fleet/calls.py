"""Calls of a function of one member for several members, along their axis `K`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from qtorch.nn.stacked import use_stacked_layers


def call_for_members(
    function: Callable[..., Any], arguments: Sequence[Any], dims: Sequence[Any], rows: Tensor
) -> Any:
    """Call a function of one member for all K members, `rows [K, ...]`, with stacked layers."""
    stacked_call = vmap(function, in_dims=tuple(dims), randomness="different")
    with use_stacked_layers():
        if len(rows) > 1 or rows.device.type != "cpu":
            return stacked_call(*arguments)
        # One member gets other kernels, and other last digits, than several: make it two.
        return call_as_two(stacked_call, arguments, dims)


def call_for_one(
    function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Any], dims: Sequence[Any]
) -> Any:
    """Call a function as `vmap` would for one member."""

    def take(argument: Any, dim: int | None) -> Any:
        return argument if dim is None else tree_map(lambda t: t[0], argument)

    values = [take(*pair) for pair in zip(arguments, dims, strict=True)]
    return tree_map(lambda t: t[None], function(*values))


def call_as_two(function: Callable[..., Any], arguments: Sequence[Any], dims: Sequence[Any]) -> Any:
    """Call a function of several members for one, as two copies; its buffers are updated too."""

    def double(argument: Any, dim: int | None) -> Any:
        return argument if dim is None else tree_map(lambda t: torch.cat((t, t)), argument)

    doubled = [double(*pair) for pair in zip(arguments, dims, strict=True)]
    result = tree_map(lambda t: t[:1], function(*doubled))
    for name, tensor in doubled[0].items():
        if not tensor.requires_grad:
            arguments[0][name].copy_(tensor[:1])
    return result
