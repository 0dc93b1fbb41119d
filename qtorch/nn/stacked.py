"""Run many networks of one architecture as one batched program (vmap over stacked weights)."""

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
    """Return whether the current forward pass runs stacked members.

    Layers whose kernels cannot be batched over members then use operations that can.
    """
    return _STACKED.get()


def stack_members(members: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Stack the parameters and buffers of M networks of one architecture: `[M, ...]` by name."""
    parameters, buffers = stack_module_state(list(members))
    return {**parameters, **buffers}


def call_stacked_members(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *args: Any,
    in_dims: int | None = None,
    **kwargs: Any,
) -> Any:
    """Call M members at once with `network`'s architecture: returns their outputs as `[M, ...]`.

    `state` are the stacked parameters and buffers (`stack_members`). `network` provides the
    architecture and the training or evaluation mode; its own weights are not used. With
    `in_dims=None` every member gets the same arguments; with 0 each gets its own, stacked along
    the first axis. Buffers that a training forward pass updates (running statistics) are updated
    in `state`. Each member has its own dropout masks.
    """

    def call_member(
        member_state: dict[str, Tensor], member_args: tuple[Any, ...], member_kwargs: dict[str, Any]
    ) -> Any:
        return functional_call(network, member_state, member_args, member_kwargs)

    with stacked_mode():
        call = torch.func.vmap(call_member, in_dims=(0, in_dims, in_dims), randomness="different")
        return call(dict(state), args, kwargs)


@contextmanager
def stacked_mode() -> Iterator[None]:
    """Context manager: layers use operations that can be batched over members."""
    token = _STACKED.set(True)
    # torch's fused attention kernels cannot be batched over members.
    is_fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fastpath_enabled)
        _STACKED.reset(token)
