"""Loops over the steps of a window, compared with their definition."""

from __future__ import annotations

from typing import Any

import torch

from qtorch.nn.recurrent import GRULayers, LSTMLayers, run_steps, split_uses
from qtorch.nn.temporal.mamba import scan
from qtorch.nn.temporal.sfm import _iterate_steps, _Recurrence


def test_scan_and_its_gradient_follow_the_recurrence() -> None:
    torch.manual_seed(0)
    decay, increment = (torch.rand(2, 5, 3, 2, dtype=torch.float64) for _ in range(2))
    states = scan(decay, increment)
    expected = torch.zeros(2, 3, 2, dtype=torch.float64)
    for t in range(5):
        expected = decay[:, t] * expected + increment[:, t]
        torch.testing.assert_close(states[:, t], expected)
    arguments = (decay.requires_grad_(), increment.requires_grad_())
    assert torch.autograd.gradcheck(scan, arguments)


def test_gradients_of_several_uses_of_a_weight_are_summed() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    uses = split_uses(weight, 3)
    total = sum((k + 1) * (use**2).sum() for k, use in enumerate(uses))
    assert isinstance(total, torch.Tensor)
    total.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([12.0, 24.0]))


def test_each_step_is_a_linear_map_of_the_last_steps_output() -> None:
    torch.manual_seed(0)
    output = torch.nn.Linear(4, 3)
    for layers in (LSTMLayers(3, 4, 2), GRULayers(3, 4, 2)):
        initial = torch.randn(2, 5, 4)
        state = (initial, torch.randn(2, 5, 4)) if isinstance(layers, LSTMLayers) else initial
        steps = run_steps(layers, torch.zeros(5, 3), state, 3, output)
        step = torch.zeros(5, 3)
        for t in range(3):
            states, state = layers(step[:, None], state)
            step = output(states[:, 0])
            torch.testing.assert_close(steps[:, t], step)
        gradients = torch.autograd.grad(steps.square().sum(), list(layers.parameters()))
        assert all(g.abs().sum() > 0 for g in gradients)


def test_recurrence_of_sfm_has_the_gradient_of_its_steps() -> None:
    torch.manual_seed(0)
    count, steps, hidden, frequencies = 2, 3, 4, 2
    width = 4 * hidden + frequencies
    inputs, recur = torch.randn(count, steps, width), torch.randn(hidden, width)
    waves, bias = torch.rand(steps, 2, frequencies), torch.randn(hidden)
    mask = torch.tensor([0.0, 1.0]).repeat(count, hidden // 2)
    tensors = inputs, waves, recur, torch.rand(2 * frequencies), bias, mask
    arguments = [t.double().requires_grad_(t is not waves and t is not mask) for t in tensors]
    leaves = [a for a in arguments if a.requires_grad]
    for state_mask in (None, arguments[-1]):
        values: list[Any] = [*arguments[:-1], state_mask]
        *_, (expected, *_) = _iterate_steps(*values)
        state = _Recurrence.apply(*values)[0]
        torch.testing.assert_close(state, expected)
        gradients, expected_gradients = (
            torch.autograd.grad(s.square().sum(), leaves) for s in (state, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients)
