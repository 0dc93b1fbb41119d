"""LSTM and GRU layers that also run for stacked members (vmap)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.stacked import has_member_dropout, is_stacked
from qtorch.nn.stacked_gru import run_gru_layer

LSTMState = tuple[Tensor, Tensor]
# From the inputs and the state of one step, both multiplied by their weights, and the state itself
# to the new state, whose first tensor is the hidden one.
Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


class LSTMLayers(nn.LSTM):
    """`nn.LSTM` over `x [B, T, F]`, batch first, with torch's parameter names.

    A single network uses torch's (cuDNN's) kernel. Stacked members (`qtorch.nn.stacked`) use a
    loop over the steps, because that kernel cannot be batched over members. `forward` returns
    `(states [B, T, H], (h, c) [L, B, H])`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        # Dropout acts between layers: torch warns if it is set for a single layer.
        dropout_p = dropout if num_layers > 1 else 0.0
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=dropout_p)

    def forward(  # type: ignore[override]  # torch also declares packed sequences
        self, x: Tensor, hx: LSTMState | None = None
    ) -> tuple[Tensor, LSTMState]:
        if not is_stacked() and _lacks_half_precision(x):
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.float(), hx)
        if hx is None:  # torch would fill two tensors with zeros
            zeros = x.new_zeros(self.num_layers, x.shape[0], self.hidden_size)
            hx = zeros, zeros
        if is_stacked():
            states, (h, c) = _run_layers(self, _lstm_step, x, hx)
            return states, (h, c)
        if has_own_dropout(self):
            states, (h, c) = _run_kernels(self, torch.lstm, x, hx)
            return states, (h, c)
        return super().forward(x, hx)

    def run(self, x: Tensor, hx: LSTMState, weights: list[Tensor]) -> tuple[Tensor, LSTMState]:
        """Run the layers with other weights, in the order of `all_weights`."""
        if _lacks_half_precision(x):
            with torch.autocast("cpu", enabled=False):
                return self.run(x.float(), hx, weights)
        states, h, c = torch.lstm(
            x, hx, weights, True, self.num_layers, self.dropout, self.training, False, True
        )
        return states, (h, c)


def _lacks_half_precision(x: Tensor) -> bool:
    """Whether oneDNN would run an LSTM in half precision, which many CPUs do not support."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


class GRULayers(nn.GRU):
    """`nn.GRU`, extended like `LSTMLayers`; `forward` returns `(states [B, T, H], h [L, B, H])`."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        dropout_p = dropout if num_layers > 1 else 0.0
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=dropout_p)

    def forward(  # type: ignore[override]  # torch also declares packed sequences
        self, x: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not is_stacked() and not has_own_dropout(self):
            return super().forward(x, hx)
        if hx is None:
            hx = x.new_zeros(self.num_layers, len(x), self.hidden_size)
        if not is_stacked():
            states, (h,) = _run_kernels(self, torch.gru, x, (hx,))
            return states, h
        if not torch.is_autocast_enabled(x.device.type):
            return _run_gru_layers(self, x, hx)
        states, (h,) = _run_layers(self, _gru_step, x, (hx,))
        return states, h

    def run(self, x: Tensor, hx: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the layers with other weights, in the order of `all_weights`."""
        return torch.gru(
            x, hx, weights, True, self.num_layers, self.dropout, self.training, False, True
        )


RNNS: dict[str, type[LSTMLayers] | type[GRULayers]] = {"LSTM": LSTMLayers, "GRU": GRULayers}


def recurrent_layers(
    kind: str, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
) -> LSTMLayers | GRULayers:
    """Return LSTM or GRU layers. Raises ValueError for another `kind`, whose case is ignored."""
    if kind.upper() not in RNNS:
        raise ValueError(f"unknown recurrent layer {kind!r}; expected one of {', '.join(RNNS)}.")
    return RNNS[kind.upper()](input_size, hidden_size, num_layers, dropout)


def split_uses(weight: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return `count` views of a weight, one for each use of it.

    Their gradients are summed by one operation. Those of a single tensor that is used `count`
    times are added one by one.
    """
    return weight.expand(count, *weight.shape).unbind(0)


def run_steps(
    layers: LSTMLayers | GRULayers, first: Tensor, state: Any, num_steps: int, output: nn.Linear
) -> Tensor:
    """Run layers on their own outputs: each step's input is a linear map of the last one's output.

    `first [B, F]` is the input of the first step, `state` the layers' initial state. Returns the
    mapped outputs `[B, num_steps, F]`.
    """
    weights = [*(w for layer in layers.all_weights for w in layer), *output.parameters()]
    step, steps = first, []
    for *layer_weights, weight, bias in zip(
        *(split_uses(w, num_steps) for w in weights), strict=True
    ):
        states, state = layers.run(step[:, None], state, layer_weights)
        step = F.linear(states.flatten(0, 1), weight, bias)
        steps.append(step)
    return torch.stack(steps, 1)


def _lstm_step(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> LSTMState:
    i, f, g, o = (inputs + recurrent).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    r, z, n = inputs.chunk(3, -1)
    hr, hz, hn = recurrent.chunk(3, -1)
    r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    n = torch.tanh(n + r * hn)
    return (n + z * (state[0] - n),)


def _run_layers(
    layers: nn.RNNBase, step: Step, x: Tensor, initial: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the layers one after another, each over all steps; `initial` are states `[L, B, H]`.

    Returns the states `[B, T, H]` of the last layer, and the last states of all layers.
    """
    last_states = []
    for k in range(layers.num_layers):
        input_weights, state_weights = (
            (getattr(layers, f"weight_{part}_l{k}"), getattr(layers, f"bias_{part}_l{k}"))
            for part in ("ih", "hh")
        )
        state = tuple(part[k] for part in initial)
        inputs = F.linear(x, *input_weights)  # of all steps at once, [B, T, gates * H]
        outputs = []
        for t in range(x.shape[1]):
            state = step(inputs[:, t], F.linear(state[0], *state_weights), state)
            outputs.append(state[0])
        x = torch.stack(outputs, 1)  # [B, T, H]
        last_states.append(state)
        if k + 1 < layers.num_layers and layers.dropout:
            x = F.dropout(x, layers.dropout, layers.training)
    return x, tuple(torch.stack(parts) for parts in zip(*last_states, strict=True))


def _run_gru_layers(layers: nn.GRU, x: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `_run_layers` does for a GRU, with fewer operations; not in mixed precision."""
    last_states = []
    for k in range(layers.num_layers):
        input_weights, state_weights = (
            (getattr(layers, f"weight_{part}_l{k}"), getattr(layers, f"bias_{part}_l{k}"))
            for part in ("ih", "hh")
        )
        states = run_gru_layer(x, initial[k], input_weights, state_weights)  # [T + 1, B, H]
        last_states.append(states[-1])
        x = states[1:].transpose(0, 1)
        if k + 1 < layers.num_layers and layers.dropout:
            x = F.dropout(x, layers.dropout, layers.training)
    return x, torch.stack(last_states)


def has_own_dropout(layers: nn.RNNBase) -> bool:
    """Whether dropout between layers has to be drawn outside of torch's kernel."""
    return has_member_dropout() and layers.training and layers.dropout > 0


def _run_kernels(
    layers: nn.RNNBase, kernel: Callable[..., Any], x: Tensor, initial: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run torch's kernel layer by layer, with `F.dropout` between; arguments as `_run_layers`."""
    last_states = []
    for k, weights in enumerate(layers.all_weights):
        state = tuple(part[k : k + 1] for part in initial)
        options = True, 1, 0.0, True, False, True  # of a single layer, batch first
        x, *last = kernel(x, state[0] if len(state) == 1 else state, weights, *options)
        last_states.append(last)
        if k + 1 < layers.num_layers:
            x = F.dropout(x, layers.dropout, layers.training)
    return x, tuple(torch.cat(parts) for parts in zip(*last_states, strict=True))


class LastState(Network, ABC):
    """Recurrent layers over the window, oldest step first, and a linear head on the last state."""

    @property
    @abstractmethod
    def layers(self) -> type[LSTMLayers] | type[GRULayers]:
        """The class of the recurrent layers."""

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.rnn = self.layers(d_feat, hidden_size, num_layers, dropout)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [B, T, F]` to scores `[B]` or `[B, Q]`."""
        states, _ = self.rnn(x)  # [B, T, H]
        return self.scores(self.fc_out(states[:, -1]))


class LSTM(LastState):
    """Stacked LSTM with a linear head on its last state.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997. Corresponds to Qlib's
    pytorch_lstm.py and pytorch_lstm_ts.py, which differ only in their data loading. The layers
    have the same names, so that weights can be copied. Differences: `num_outputs`; a batch with
    one sample keeps its shape; no warning about dropout with a single layer (torch applies none).
    """

    layers = LSTMLayers


class GRU(LastState):
    """Stacked GRU with a linear head on its last state.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014. Corresponds to
    Qlib's pytorch_gru.py and pytorch_gru_ts.py, with the same layer names. The differences are
    those of `LSTM`.
    """

    layers = GRULayers
