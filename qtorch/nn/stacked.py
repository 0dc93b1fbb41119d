"""Run many networks of one architecture as one batched program (vmap over stacked weights)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

_STACKED: ContextVar[bool] = ContextVar("qtorch_nn_stacked", default=False)
_MEMBER_DROPOUT: ContextVar[bool] = ContextVar("qtorch_nn_member_dropout", default=False)


def is_stacked() -> bool:
    """Return whether the current forward pass runs stacked members.

    Layers whose kernels cannot be batched over members then use operations that can.
    """
    return _STACKED.get()


def has_member_dropout() -> bool:
    """Return whether the current forward pass draws dropout masks by `member_dropout`.

    Layers whose kernels draw masks themselves must then leave that to `F.dropout`.
    """
    return _MEMBER_DROPOUT.get()


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
    in `state`. Each member has its own dropout masks, of torch's generator.
    """

    def call_member(
        member_state: dict[str, Tensor], member_args: tuple[Any, ...], member_kwargs: dict[str, Any]
    ) -> Any:
        return functional_call(network, member_state, member_args, member_kwargs)

    with use_stacked_layers():
        call = torch.func.vmap(call_member, in_dims=(0, in_dims, in_dims), randomness="different")
        return call(dict(state), args, kwargs)


@contextmanager
def use_stacked_layers() -> Iterator[None]:
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


@contextmanager
def member_dropout(key: Tensor) -> Iterator[None]:
    """Context manager for one member's forward pass: its dropout masks depend on `key` alone.

    `key` is an int32 scalar, of each member inside `vmap`, that should differ between steps. The
    masks do not depend on which other members there are, nor on a random generator. (They are not
    those of a training by itself, which draws them from torch's generator.) Entered inside `vmap`.
    """
    calls = itertools.count()

    def dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return draw_dropout(input, p, key, next(calls)) if training and p > 0.0 else input

    def attention(query: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        options = dict(zip(names, args, strict=False)) | kwargs
        p = options.pop("dropout_p", 0.0)
        if p == 0.0:
            return fused_attention(query, k, v, **options)
        weights = _attention_weights(query, k, **options)
        return dropout(weights, p) @ v

    original_dropout, fused_attention = F.dropout, F.scaled_dot_product_attention
    # Layers call both by their names in torch.nn.functional; there is no hook for it.
    F.dropout, F.scaled_dot_product_attention = dropout, attention  # type: ignore[assignment]  # as above
    token = _MEMBER_DROPOUT.set(True)
    try:
        yield
    finally:
        _MEMBER_DROPOUT.reset(token)
        F.dropout, F.scaled_dot_product_attention = original_dropout, fused_attention


def _attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights `[..., L, S]` of torch's scaled_dot_product_attention."""
    if enable_gqa:
        raise NotImplementedError("dropout of grouped attention is not available for members.")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        shape = scores.shape[-2:]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    return scores.softmax(-1)


def draw_dropout(input: Tensor, p: float, key: Tensor, call: int) -> Tensor:
    """Set a share `p` of the elements to zero, and scale the others up.

    `key` is that of one member, or of each of K members as `[K, 1, ...]`, with as many axes as
    `input [K, ...]`. `call` is the number of the dropout layer in the forward pass.
    """
    if p == 1.0:
        return input * 0.0
    shape = input.shape[1:] if key.dim() else input.shape
    bits = _hash_positions(shape, key + call * _CALL_STEP)
    is_kept = bits >= round(p * 2**32) - 2**31
    return input * is_kept.to(input.dtype) * (1.0 / (1.0 - p))


def mix_keys(seeds: Tensor, steps: Tensor) -> Tensor:
    """Return an int32 key `[K]` for each pair of a seed and a step, int64 `[K]` each."""
    key = (seeds * _SEED_STEP + steps * _STEP_STEP) & 0xFFFFFFFF
    return _mix((key - 2**31).to(torch.int32))


# Odd numbers, by which the places of a batch, its dropout layers, steps and seeds are spread over
# the 32 bits before they are mixed.
_PLACE_STEP, _CALL_STEP, _STEP_STEP, _SEED_STEP = -1640531535, 739982445, 695872825, 668265263


def _hash_positions(shape: torch.Size, key: Tensor) -> Tensor:
    """Return evenly distributed int32 numbers in a shape, a function of `key`."""
    places = torch.arange(shape.numel(), dtype=torch.int32, device=key.device).view(shape)
    return _mix(places * _PLACE_STEP + key)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int32 numbers: shifts and multiplications, as hash functions do."""
    for shift, factor in ((16, 2146121005), (15, -2073254261), (16, 0)):
        x = x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))
        x = x * factor if factor else x
    return x
