"""SFM: a recurrent network whose memory is decomposed by frequency."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class SFM(Network):
    """State frequency memory: each of H states has a memory of `freq_dim` frequencies.

    The memory decays with a forget gate per state and one per frequency. The next hidden state is
    computed from its amplitudes.

    Zhang, Aggarwal and Qi, "Stock Price Prediction via Discovering Multi-Frequency Trading
    Patterns", KDD 2017. Corresponds to Qlib's pytorch_sfm.py; `gates` and `recur` hold its W and U
    matrices concatenated in the order of `_part_sizes`. Differences: `dropout_W` (on the features)
    and `dropout_U` (on the state) are applied, with one mask for all steps of a window, while Qlib
    accepts and ignores them; the waves have the precision of the weights (double in Qlib); only
    the last state is projected, because the others are not used; `num_outputs`.
    """

    waves: Tensor

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        output_dim: int = 1,
        freq_dim: int = 10,
        dropout_W: float = 0.0,
        dropout_U: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.dropout_W, self.dropout_U = dropout_W, dropout_U
        # Input gate, forget gate of the states, candidate, output gate, forget gate of the
        # frequencies.
        self._part_sizes = [hidden_size, hidden_size, hidden_size, hidden_size, freq_dim]
        self.gates = nn.Linear(d_feat, sum(self._part_sizes))
        self.recur = nn.Linear(hidden_size, sum(self._part_sizes), bias=False)
        self.amplitude = nn.Parameter(nn.init.orthogonal_(torch.empty(freq_dim, 1)))
        self.amplitude_bias = nn.Parameter(torch.zeros(hidden_size))
        self.project = nn.Linear(hidden_size, output_dim)
        self.fc_out = nn.Linear(output_dim, num_outputs)
        self.register_buffer("waves", torch.arange(freq_dim) / freq_dim, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialize each gate separately, as the authors do, with forget gate biases of one."""
        for layer, init in (
            (self.gates, nn.init.xavier_uniform_),
            (self.recur, nn.init.orthogonal_),
        ):
            for part in torch.split(layer.weight.data, self._part_sizes):
                init(part)
        hidden = self._part_sizes[0]
        bias = self.gates.bias.data.zero_()
        bias[hidden : 2 * hidden] = 1
        bias[4 * hidden :] = 1
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        hidden = self._part_sizes[0]
        # Input part of all gates for all steps, [B, T, 4H + K].
        x = x * _dropout_mask(x[:, :1], self.dropout_W, self.training)
        inputs = F.linear(x, *map(self._move_candidate, (self.gates.weight, self.gates.bias)))
        state_mask = None
        if self.dropout_U and self.training:
            count = x.shape[0]  # torch.export would treat len(x) as a constant
            state_mask = _dropout_mask(x.new_zeros(count, hidden), self.dropout_U, self.training)
        with torch.autocast(x.device.type, enabled=False):
            precision = torch.promote_types(inputs.dtype, torch.float32)
            arguments = (
                inputs.to(precision),
                self._waves(x.shape[1]),
                self._move_candidate(self.recur.weight).t(),
                self.amplitude.repeat(2, 1).squeeze(-1),  # of real and imaginary part, [2 * K]
                self.amplitude_bias,
                state_mask,
            )
            if torch.is_grad_enabled():
                state = _Recurrence.apply(*arguments)[0]  # type: ignore[no-untyped-call]  # untyped in torch
            else:
                for state, *_ in _iterate_steps(*arguments):  # noqa: B007  # the last one counts
                    pass
        return self.scores(self.fc_out(self.project(state)))

    def _move_candidate(self, values: Tensor) -> Tensor:
        """Return the weights or biases `[4H + K, ...]` of all parts with the candidate's last."""
        i, state_gate, candidate, o, frequency_gate = torch.split(values, self._part_sizes)
        return torch.cat((i, state_gate, o, frequency_gate, candidate))

    def _waves(self, num_steps: int) -> Tensor:
        """Return cosine and sine of each step and frequency, `[T, 2, K]`."""
        steps = torch.arange(1, num_steps + 1, dtype=torch.float64, device=self.waves.device)
        angles = (2 * math.pi * steps).to(self.waves.dtype)[:, None] * self.waves  # [T, K]
        return torch.stack((torch.cos(angles), torch.sin(angles)), 1)


def _iterate_steps(
    inputs: Tensor, waves: Tensor, recur: Tensor, amplitude: Tensor, bias: Tensor,
    state_mask: Tensor | None,
) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """Yield the state `[B, H]` after each step, then what its gradient needs.

    That is the masked state before it, the sums of its gates `[B, 3H + K]`, the candidate, how much
    of the memory stays `[B, H, K]`, the memory `[B, H, 2, K]`, and the amplitude before the output
    gate. Arguments as of `_Recurrence`.
    """
    count, hidden, frequencies = inputs.shape[0], bias.shape[0], waves.shape[-1]
    state = inputs.new_zeros(count, hidden)
    row_bias = bias.expand(count, hidden).flatten()
    memory: Tensor | None = None
    for step_inputs, wave in zip(inputs.unbind(1), waves.unbind(0), strict=True):
        before = state if state_mask is None else state * state_mask
        parts = step_inputs if memory is None else torch.addmm(step_inputs, before, recur)
        sums, candidate = torch.split(parts, [3 * hidden + frequencies, hidden], -1)
        i, state_gate, o, frequency_gate = torch.split(
            F.hardsigmoid(sums), [hidden, hidden, hidden, frequencies], -1
        )
        candidate = torch.tanh(candidate)
        retention = state_gate[:, :, None] * frequency_gate[:, None]
        # Real and imaginary parts in one tensor: half as many operations.
        added = (i * candidate)[..., None, None]
        memory = (
            added * wave
            if memory is None
            else torch.addcmul(retention[:, :, None] * memory, added, wave)
        )
        power = torch.addmv(row_bias, memory.square().view(-1, 2 * frequencies), amplitude)
        output = torch.tanh(power.view(count, hidden))
        state = o * output
        yield state, before, sums, candidate, retention, memory, output


NUM_STEP_TENSORS = 6  # that the gradient of a step needs


class _Recurrence(torch.autograd.Function):
    """The last state `[B, H]` of the recurrence over `inputs [B, T, 4H + K]`.

    `waves [T, 2, K]`, `recur [H, 4H + K]`, `amplitude [2K]`, `bias [H]`, `state_mask [B, H]` or
    None. Its gradient has half the operations of the gradients of its parts: what does not depend
    on the next step is computed for all steps at once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        steps = list(_iterate_steps(*arguments))
        return steps[-1][0], *(tensor for step in steps for tensor in step[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _, waves, recur, amplitude, _, state_mask = inputs
        ctx.save_for_backward(waves, recur, amplitude, state_mask, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        waves, recur, amplitude, state_mask, *tensors = ctx.saved_tensors
        steps = [tensors[k::NUM_STEP_TENSORS] for k in range(NUM_STEP_TENSORS)]
        before, sums, candidates, retentions, memories, outputs = steps
        hidden, frequencies = recur.shape[0], waves.shape[-1]
        # Slopes of all steps: of the state by the power, and of what the parts multiply by them.
        # The slope of the power by the memory has the same factor at all steps. It is not part of
        # the memory's gradient, but of all that multiplies that. The gradients of the frequencies'
        # gates are summed over real and imaginary part at last.
        factor = 2 * amplitude  # [2 * K]
        all_sums, candidate, output = (torch.stack(s) for s in (sums, candidates, outputs))
        gates = F.hardsigmoid(all_sums)
        i, state_gates, o, frequency_gates = torch.split(
            gates, [hidden, hidden, hidden, frequencies], -1
        )
        is_linear = ((all_sums > -3) & (all_sums < 3)).to(gates.dtype) / 6
        linear, linear_frequency = torch.split(is_linear, [3 * hidden, frequencies], -1)
        slopes = torch.cat(
            (
                linear * torch.cat((candidate, torch.ones_like(i), output), -1),
                linear_frequency.repeat(1, 1, 2) * factor,
                i * (1 - candidate.square()),
            ),
            -1,
        )  # [T, B, 4H + 2K]
        power_slopes = o * (1 - output.square())  # [T, B, H]
        state_gate_rows = state_gates[:, :, None]  # [T, B, 1, H]
        frequency_gate_columns = (frequency_gates.repeat(1, 1, 2) * factor)[..., None]
        wave_columns = waves.flatten(1) * factor  # [T, 2 * K]
        recur_gates, recur_frequency, recur_candidate = torch.split(
            recur, [3 * hidden, frequencies, hidden], -1
        )
        recur_columns = torch.cat(
            (recur_gates, recur_frequency, recur_frequency, recur_candidate), -1
        ).t()
        memory_gradient: Tensor | None = None
        part_gradients, power_gradients = [], []
        for t in reversed(range(len(before))):
            memory = memories[t].flatten(-2)
            power_gradient = gradient * power_slopes[t]  # [B, H]
            power_gradients.append(power_gradient)
            memory_gradient = (
                power_gradient[..., None] * memory
                if memory_gradient is None
                else torch.addcmul(memory_gradient, power_gradient[..., None], memory)
            )  # [B, H, 2 * K]
            to_candidate = memory_gradient @ wave_columns[t]
            if t:
                to_gates = memory_gradient * memories[t - 1].flatten(-2)
                to_state_gate = (to_gates @ frequency_gate_columns[t]).squeeze(-1)
                to_frequency_gate = (state_gate_rows[t] @ to_gates).squeeze(-2)  # [B, 2 * K]
            else:  # the memory was empty
                to_state_gate, to_frequency_gate = torch.split(
                    gradient.new_zeros(len(gradient), hidden + 2 * frequencies),
                    [hidden, 2 * frequencies],
                    -1,
                )
            part_gradient = slopes[t] * torch.cat(
                (to_candidate, to_state_gate, gradient, to_frequency_gate, to_candidate), -1
            )
            part_gradients.append(part_gradient)
            if t:
                gradient = part_gradient @ recur_columns
                gradient = gradient if state_mask is None else gradient * state_mask
                memory_gradient = memory_gradient.unflatten(-1, (2, frequencies))
                memory_gradient = (memory_gradient * retentions[t][:, :, None]).flatten(-2)
        gates_gradient, real, imaginary, candidate_gradient = torch.split(
            torch.stack(part_gradients[::-1], 1), [3 * hidden, frequencies, frequencies, hidden], -1
        )
        parts_gradient = torch.cat(
            (gates_gradient, real + imaginary, candidate_gradient), -1
        )  # [B, T, 4H + K]
        states = torch.stack(before, 1)
        recur_gradient = states.flatten(0, 1).t() @ parts_gradient.flatten(0, 1)
        power_gradient = torch.stack(power_gradients[::-1])  # [T, B, H]
        squares = torch.stack(memories).view(-1, 2 * frequencies)
        squares.mul_(squares)  # in place: it is as large as all memories
        amplitude_gradient = (power_gradient.view(1, -1) @ squares).squeeze(0)
        bias_gradient = power_gradient.sum((0, 1))
        return parts_gradient, None, recur_gradient, amplitude_gradient, bias_gradient, None


def _dropout_mask(reference: Tensor, p: float, training: bool) -> Tensor:
    """Return ones after dropout, with the shape of `reference`."""
    return F.dropout(torch.ones_like(reference), p, training)
