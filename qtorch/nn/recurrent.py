"""Recurrent layers of one family: torch's own for one network, a batched time loop for many."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.stacked import is_stacked

LSTMState = tuple[Tensor, Tensor]


class LSTMLayers(nn.LSTM):
    """`nn.LSTM` over `x [B, T, F]`, batch first, with its parameters by their names.

    One network runs torch's (cuDNN's) kernel. Stacked members (`qtorch.nn.stacked`) run step by
    step in operations that are batched over them, which torch's kernel cannot be. `forward`
    returns `(states [B, T, H], (h, c) [L, B, H])`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        # torch warns of dropout with one layer, where there is nothing between layers to drop.
        between = dropout if num_layers > 1 else 0.0
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=between)

    def forward(  # type: ignore[override]  # torch declares packed sequences too
        self, x: Tensor, hx: LSTMState | None = None
    ) -> tuple[Tensor, LSTMState]:
        if is_stacked():
            return self._loop(x, hx)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # oneDNN has no half-precision LSTM for many CPUs and raises where it has none.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float(), hx)
        return super().forward(x, hx)

    def _loop(self, x: Tensor, hx: LSTMState | None) -> tuple[Tensor, LSTMState]:
        if hx is None:
            zero = x.new_zeros(self.num_layers, len(x), self.hidden_size)
            hx = (zero, zero)
        c0 = hx[1]

        def cell(k: int) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            recur = _weights(self, k)[1]

            def step(given: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                gates = given + F.linear(state[0], *recur)
                i, f, g, o = gates.chunk(4, -1)
                c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
                return torch.sigmoid(o) * torch.tanh(c), c

            return step

        states, last = _run(self, x, cell, [(hx[0][k], c0[k]) for k in range(self.num_layers)])
        return states, (torch.stack([s[0] for s in last]), torch.stack([s[1] for s in last]))


class GRULayers(nn.GRU):
    """`nn.GRU` over `x [B, T, F]`, as `LSTMLayers`; returns `(states [B, T, H], h [L, B, H])`."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        between = dropout if num_layers > 1 else 0.0
        super().__init__(input_size, hidden_size, num_layers, batch_first=True, dropout=between)

    def forward(  # type: ignore[override]  # torch declares packed sequences too
        self, x: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not is_stacked():
            return super().forward(x, hx)
        if hx is None:
            hx = x.new_zeros(self.num_layers, len(x), self.hidden_size)

        def cell(k: int) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
            recur = _weights(self, k)[1]

            def step(given: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                (h,) = state
                r, z, n = given.chunk(3, -1)
                hr, hz, hn = F.linear(h, *recur).chunk(3, -1)
                r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
                n = torch.tanh(n + r * hn)
                return (n + z * (h - n),)

            return step

        states, last = _run(self, x, cell, [(hx[k],) for k in range(self.num_layers)])
        return states, torch.stack([s[0] for s in last])


RNNS: dict[str, type[LSTMLayers] | type[GRULayers]] = {"LSTM": LSTMLayers, "GRU": GRULayers}


def recurrent_layers(
    kind: str, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
) -> LSTMLayers | GRULayers:
    """LSTM or GRU layers by name, whatever its case. Raises ValueError for another name."""
    if kind.upper() not in RNNS:
        raise ValueError(f"the recurrent layer is {kind!r}; expected one of {', '.join(RNNS)}.")
    return RNNS[kind.upper()](input_size, hidden_size, num_layers, dropout)


def _weights(layers: nn.RNNBase, k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(weight, bias) on the input, and on the state, of layer k."""
    given = getattr(layers, f"weight_ih_l{k}"), getattr(layers, f"bias_ih_l{k}")
    recur = getattr(layers, f"weight_hh_l{k}"), getattr(layers, f"bias_hh_l{k}")
    return given, recur


def _run(
    layers: nn.RNNBase,
    x: Tensor,
    cell: Callable[[int], Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]],
    states: list[tuple[Tensor, ...]],
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The layers one after another, each over all steps; what depends on the input alone is one
    matrix product for all steps."""
    last = []
    for k, state in enumerate(states):
        step, given = cell(k), F.linear(x, *_weights(layers, k)[0])  # [B, T, gates * H]
        outputs = []
        for t in range(x.shape[1]):
            state = step(given[:, t], state)
            outputs.append(state[0])
        x = torch.stack(outputs, 1)  # [B, T, H]
        last.append(state)
        if k + 1 < len(states) and layers.dropout:
            x = F.dropout(x, layers.dropout, layers.training)
    return x, last
