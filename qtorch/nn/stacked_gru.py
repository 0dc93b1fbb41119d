"""A GRU layer of several members, with a backward pass written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]

# A gradient times the derivative of an activation, by the activation's value, in one operation.
tanh_backward = torch.ops.aten.tanh_backward.grad_input
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def run_gru_layer(
    x: Tensor, state: Tensor, input_weights: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the states `[T + 1, B, H]` of one member's layer, inside `vmap`; the first is `state`.

    `x [B, T, F]`, `state [B, H]`; `input_weights` and `weights` are torch's weight and bias for the
    inputs and for the states.
    """
    arguments = (x, state, *input_weights, *weights)
    states, *_ = _StackedGRU.apply(*(a[None] for a in arguments))  # type: ignore[no-untyped-call]  # torch has no types here
    return states[0].permute(1, 2, 0)


class _StackedGRU(torch.autograd.Function):
    """A layer of K members: `x [K, B, T, F]`, state `[K, B, H]`, weights with the same axis.

    Autograd of a loop over the steps runs and stores each of its small operations; here a step has
    seven operations forward and a dozen backward. Samples are the last axis of all that is computed
    by step: small members have few units and many samples, and a CPU is fast on long rows.

    Returns the states `[K, H, T + 1, B]` and what the backward pass needs: the inputs
    `[K, T * B, F]`, the gates `[K, 3 * H, T, B]` after their activations, and the part
    `[K, H, T, B]` of the states in the candidate before it is multiplied by the reset gate.
    """

    @staticmethod
    def forward(
        x: Tensor, state: Tensor, w_input: Tensor, b_input: Tensor, w_state: Tensor, b_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_members, num_rows, num_steps, _ = x.shape
        size = state.shape[-1]
        inputs = x.transpose(1, 2).flatten(1, 2)
        gates = torch.baddbmm(b_input[..., None], w_input, inputs.transpose(1, 2))
        gates = gates.view(num_members, 3 * size, num_steps, num_rows)
        states = x.new_empty(num_members, size, num_steps + 1, num_rows)
        candidates = x.new_empty(num_members, size, num_steps, num_rows)
        states[:, :, 0] = state.transpose(1, 2)
        bias = b_state[..., None]
        for t in range(num_steps):
            recurrent = torch.baddbmm(bias, w_state, states[:, :, t])
            switches, candidate = gates[:, : 2 * size, t], gates[:, 2 * size :, t]
            switches.add_(recurrent[:, : 2 * size]).sigmoid_()
            reset, update = switches.chunk(2, 1)
            candidates[:, :, t] = recurrent[:, 2 * size :]
            candidate.addcmul_(reset, recurrent[:, 2 * size :]).tanh_()
            torch.lerp(candidate, states[:, :, t], update, out=states[:, :, t + 1])
        return states, inputs, gates, candidates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, _, w_input, _, w_state, _ = inputs
        states, *saved_tensors = output
        ctx.mark_non_differentiable(*saved_tensors)
        ctx.save_for_backward(w_input, w_state, states, *saved_tensors)

    @staticmethod
    def backward(ctx: Any, of_states: Tensor, *_: Any) -> Gradients:
        w_input, w_state, states, inputs, gates, candidates = ctx.saved_tensors
        num_members, _, num_steps, num_rows = gates.shape
        size = states.shape[1]
        of_inputs, of_recurrent = torch.empty_like(gates), torch.empty_like(gates)
        gradient, transposed = of_states[:, :, num_steps], w_state.transpose(1, 2)
        for t in reversed(range(num_steps)):
            reset, update, candidate = gates[:, :, t].chunk(3, 1)
            of_reset, of_update, of_candidate = of_inputs[:, :, t].chunk(3, 1)
            torch.addcmul(gradient, gradient, update, value=-1.0, out=of_candidate)
            tanh_backward(of_candidate, candidate, grad_input=of_candidate)
            torch.mul(of_candidate, candidates[:, :, t], out=of_reset)
            torch.mul(gradient, states[:, :, t] - candidate, out=of_update)
            of_switches = of_inputs[:, : 2 * size, t]
            sigmoid_backward(of_switches, gates[:, : 2 * size, t], grad_input=of_switches)
            of_recurrent[:, : 2 * size, t] = of_switches
            torch.mul(of_candidate, reset, out=of_recurrent[:, 2 * size :, t])
            gradient = torch.addcmul(of_states[:, :, t], gradient, update)
            gradient = gradient.baddbmm_(transposed, of_recurrent[:, :, t])
        of_x, of_inputs, of_recurrent = None, of_inputs.flatten(2), of_recurrent.flatten(2)
        if ctx.needs_input_grad[0]:
            of_rows = torch.bmm(of_inputs.transpose(1, 2), w_input)
            of_x = of_rows.view(num_members, num_steps, num_rows, -1).transpose(1, 2)
        earlier_states = states.flatten(2)[..., : num_steps * num_rows]
        return (
            of_x,
            gradient.transpose(1, 2),
            torch.bmm(of_inputs, inputs),
            of_inputs.sum(2),
            torch.bmm(of_recurrent, earlier_states.transpose(1, 2)),
            of_recurrent.sum(2),
        )

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
        return tuple(each[:, None] for each in results), (0, 0, 0, 0)
