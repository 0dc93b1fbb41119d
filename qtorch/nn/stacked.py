"""Many networks of one architecture as one batched program: members stacked along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

_STACKED: ContextVar[bool] = ContextVar("qtorch_nn_stacked", default=False)


def is_stacked() -> bool:
    """Whether the running forward is of stacked members: layers whose kernels cannot be batched
    over members then take operations that can."""
    return _STACKED.get()


def stack_members(members: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers `[M, ...]` by name, of members of one architecture."""
    parameters, buffers = stack_module_state(list(members))
    return {**parameters, **buffers}


def stacked_call(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *args: Any,
    in_dims: int | None = None,
    **kwargs: Any,
) -> Any:
    """`network(*args)` for M members at once: `[M, ...]` of what one member gives.

    `state` are stacked parameters and buffers (`stack_members`); `network` lends its form and
    its mode, and its own weights are not looked at. `in_dims=None` gives every member the same
    arguments, 0 gives each its own, stacked along their first axis. Buffers that a training
    forward changes (running statistics) are changed in `state`. Dropout differs by member.
    """

    def one(own: dict[str, Tensor], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return functional_call(network, own, given, named)

    with _stacked():
        call = torch.func.vmap(one, in_dims=(0, in_dims, in_dims), randomness="different")
        return call(dict(state), args, kwargs)


@contextmanager
def _stacked() -> Iterator[None]:
    token = _STACKED.set(True)
    # torch's fused attention kernels are for one network.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _STACKED.reset(token)
