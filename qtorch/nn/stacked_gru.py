"""A GRU layer of several members, with a backward pass written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def run_gru_layer(
    x: Tensor, state: Tensor, input_weights: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the states `[T + 1, B, H]` of one member's layer, inside `vmap`; the first is `state`.

    `x [B, T, F]`, `state [B, H]`; `input_weights` and `weights` are torch's weight and bias for the
    inputs and for the states.
    """
    arguments = (x, state, *input_weights, *weights)
    states, _, _ = _StackedGRU.apply(*(a[None] for a in arguments))  # type: ignore[no-untyped-call]  # torch has no types here
    return states[0]


class _StackedGRU(torch.autograd.Function):
    """A layer of K members: `x [K, B, T, F]`, state `[K, B, H]`, weights with the same axis.

    Autograd of a loop over the steps runs and stores each of its small operations; here a step has
    seven operations forward and a dozen backward. Also returns what the backward pass needs: the
    gates `[K, T, B, 3 * H]` after their activations, and the part `[K, T, B, H]` of the states in
    the candidate before it is multiplied by the reset gate.
    """

    @staticmethod
    def forward(
        x: Tensor, state: Tensor, w_input: Tensor, b_input: Tensor, w_state: Tensor, b_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_members, num_rows, num_steps, _ = x.shape
        size = state.shape[-1]
        inputs = torch.baddbmm(b_input[:, None], x.flatten(1, 2), w_input.transpose(1, 2))
        inputs = inputs.view(num_members, num_rows, num_steps, 3 * size)
        gates = inputs.transpose(1, 2).contiguous()  # [K, T, B, 3 * H]
        states = x.new_empty(num_members, num_steps + 1, num_rows, size)
        candidates = x.new_empty(num_members, num_steps, num_rows, size)
        states[:, 0] = state
        bias, weight = b_state[:, None], w_state.transpose(1, 2)
        for t in range(num_steps):
            recurrent = torch.baddbmm(bias, states[:, t], weight)
            switches = gates[:, t, :, : 2 * size]  # reset and update gate
            candidate = gates[:, t, :, 2 * size :]
            switches.add_(recurrent[..., : 2 * size]).sigmoid_()
            reset, update = switches.chunk(2, -1)
            candidates[:, t] = recurrent[..., 2 * size :]
            candidate.addcmul_(reset, recurrent[..., 2 * size :]).tanh_()
            torch.lerp(candidate, states[:, t], update, out=states[:, t + 1])
        return states, gates, candidates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, _, w_input, _, w_state, _ = inputs
        states, gates, candidates = output
        ctx.mark_non_differentiable(gates, candidates)
        ctx.save_for_backward(x, w_input, w_state, states, gates, candidates)

    @staticmethod
    def backward(ctx: Any, of_states: Tensor, *_: Any) -> Gradients:
        x, w_input, w_state, states, gates, candidates = ctx.saved_tensors
        num_members, num_rows, num_steps, _ = x.shape
        size = states.shape[-1]
        of_inputs, of_recurrent = torch.empty_like(gates), torch.empty_like(gates)
        gradient = of_states[:, num_steps]
        for t in reversed(range(num_steps)):
            reset, update, candidate = gates[:, t].chunk(3, -1)
            of_reset, of_update, of_candidate = of_inputs[:, t].chunk(3, -1)
            torch.mul(gradient, 1.0 - update, out=of_candidate)
            of_candidate.mul_(1.0 - candidate * candidate)
            torch.mul(of_candidate, candidates[:, t], out=of_reset)
            torch.mul(gradient, states[:, t] - candidate, out=of_update)
            switches = gates[:, t, :, : 2 * size]
            of_inputs[:, t, :, : 2 * size].mul_(switches * (1.0 - switches))
            of_recurrent[:, t, :, : 2 * size] = of_inputs[:, t, :, : 2 * size]
            torch.mul(of_candidate, reset, out=of_recurrent[:, t, :, 2 * size :])
            gradient = torch.addcmul(of_states[:, t], gradient, update)
            gradient = gradient.baddbmm_(of_recurrent[:, t], w_state)
        rows = of_inputs.transpose(1, 2).reshape(num_members, num_rows * num_steps, 3 * size)
        of_w_input = torch.bmm(rows.transpose(1, 2), x.flatten(1, 2))
        of_x = torch.bmm(rows, w_input).view_as(x) if ctx.needs_input_grad[0] else None
        recurrent_rows = of_recurrent.flatten(1, 2)
        of_w_state = torch.bmm(recurrent_rows.transpose(1, 2), states[:, :-1].flatten(1, 2))
        return of_x, gradient, of_w_input, rows.sum(1), of_w_state, recurrent_rows.sum(1)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Run the members of `vmap`, of which each has one, `[1, ...]`."""
        members = [
            a.expand(info.batch_size, *a.shape[1:]) if dim is None else a.movedim(dim, 0)[:, 0]
            for a, dim in zip(arguments, in_dims, strict=True)
        ]
        results = _StackedGRU.apply(*members)  # type: ignore[no-untyped-call]  # torch has no types here
        return tuple(each[:, None] for each in results), (0, 0, 0)
