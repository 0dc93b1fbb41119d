"""ADD: what is an instrument's own, told apart from what is the market's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtorch.nn.cross_section import MaskedBatchNorm
from qtorch.nn.network import Network
from qtorch.nn.recurrent import LSTMState, recurrent_layers

MARKETS = 3  # states of the market: down, between, up


class ADD(Network):
    """A score from a recurrent state that is taught to know nothing of the market.

    Tang et al., "ADD: Augmented Disentanglement Distillation Framework for Improving Stock Trend
    Forecasting", 2020. Answers to Qlib's pytorch_add.py; the layers have the same names. What
    predicts is here, `enc_excess` and `pred_excess`; what only teaches is its `Disentangler`,
    which `qtorch.model.ADDModule` trains beside it and which a fitted model does without.

    Differences: batches are whole days, and padding counts in no statistic; several days in one,
    or the norm would take away what a day's instruments have in common; `num_outputs`. As in
    Qlib's, without the paper's distillation from its own earlier epochs and its augmentation.
    """

    cross_section = True

    def __init__(
        self,
        d_feat: int = 6,
        base_model: str = "GRU",
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.form = (d_feat, hidden_size, num_layers, dropout, base_model, num_outputs)
        self.enc_excess = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.pred_excess = Head(hidden_size * num_layers, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x [G, N, T, F]`, `mask [G, N]` to `[G, N]` or `[G, N, Q]`."""
        # Nothing is expanded; a traced program learns that the sizes are the same, and takes a day
        # of one instrument.
        return self.read(self.encode(x), mask.expand(x.shape[:2]))

    def encode(self, x: Tensor) -> Tensor | LSTMState:
        """The last state of all layers, `[L, G * N, H]`, two of them where they are LSTM's."""
        state: Tensor | LSTMState = self.enc_excess(x.flatten(0, 1))[1]
        return state

    def read(self, state: Tensor | LSTMState, mask: Tensor) -> Tensor:
        """The scores that a state gives."""
        return self.scores(self.pred_excess(read_out(state, mask), mask))

    def disentangler(self, dec_dropout: float = 0.0) -> Disentangler:
        """A new one that fits this network."""
        return Disentangler(*self.form, dec_dropout)


class Lessons(NamedTuple):
    """What a Disentangler says of a batch: logits of the market `[G, N, 3]` from the market's
    state and from the other, scores `[G, N]` or `[G, N, Q]` from the market's state, and the
    windows `[G, N, T, F]` from both."""

    market: Tensor
    adv_market: Tensor
    adv_excess: Tensor
    rebuilt: Tensor


class Disentangler(nn.Module):
    """The market's own encoder, two adversaries, and a decoder; named as in Qlib's ADDModel.

    The adversaries read from each state what it should not know; they learn to, and the encoders
    learn to prevent it, for their gradient comes back reversed and times `alpha`.
    """

    def __init__(
        self,
        d_feat: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        base_model: str,
        num_outputs: int,
        dec_dropout: float,
    ) -> None:
        super().__init__()
        width = hidden_size * num_layers
        self.num_outputs = num_outputs
        self.enc_market = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.dec = Decoder(d_feat, 2 * hidden_size, num_layers, dec_dropout, base_model)
        self.pred_market, self.adv_market = Head(width, MARKETS), Head(width, MARKETS)
        self.adv_excess = Head(width, num_outputs)

    def forward(self, x: Tensor, mask: Tensor, excess: Tensor | LSTMState, alpha: float) -> Lessons:
        """`x [G, N, T, F]`, `mask [G, N]`, `excess` the network's `encode(x)`."""
        market: Tensor | LSTMState = self.enc_market(x.flatten(0, 1))[1]
        own, common = read_out(excess, mask), read_out(market, mask)
        adv_excess = self.adv_excess(reversed_gradient(common, alpha), mask)
        return Lessons(
            market=self.pred_market(common, mask),
            adv_market=self.adv_market(reversed_gradient(own, alpha), mask),
            adv_excess=adv_excess[..., 0] if self.num_outputs == 1 else adv_excess,
            rebuilt=self.dec(_beside(excess, market), x.shape[2]).unflatten(0, x.shape[:2]),
        )


class Head(nn.Sequential):
    """A hidden layer, its norm over the samples of the batch, and an output."""

    def __init__(self, width: int, outputs: int) -> None:
        norm = MaskedBatchNorm(width)
        super().__init__(nn.Linear(width, width), norm, nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, state: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # a mask
        """`[G, N, width]` to `[G, N, outputs]`."""
        hidden, norm, act, out = self
        found: Tensor = out(act(norm(hidden(state), mask)))
        return found


class Decoder(nn.Module):
    """A window from a state, oldest step first; each step is made from the one before it."""

    def __init__(
        self, d_feat: int, hidden_size: int, num_layers: int, dropout: float, base_model: str
    ) -> None:
        super().__init__()
        self.rnn = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.fc = nn.Linear(hidden_size, d_feat)

    def forward(self, state: Any, num_steps: int) -> Tensor:
        """The state of B samples to `[B, T, F]`."""
        first = state[0] if isinstance(state, tuple) else state
        step, steps = first.new_zeros(first.shape[1], self.fc.out_features), []
        for _ in range(num_steps):
            found, state = self.rnn(step[:, None], state)
            step = self.fc(found[:, 0])
            steps.append(step)
        return torch.stack(steps, 1)


def reversed_gradient(x: Tensor, alpha: float) -> Tensor:
    """What comes in; its gradient is multiplied by -alpha.

    Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.
    """
    same: Tensor = _Reversal.apply(x, alpha)  # type: ignore[no-untyped-call]  # torch's own
    return same


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * grad, None


def read_out(state: Tensor | LSTMState, mask: Tensor) -> Tensor:
    """The hidden states of all layers beside each other: `[L, G * N, H]` to `[G, N, L * H]`."""
    hidden = state[0] if isinstance(state, tuple) else state
    return hidden.transpose(0, 1).reshape(*mask.shape, -1)


def _beside(one: Any, other: Any) -> Any:
    """Two states as one of twice the width."""
    if isinstance(one, tuple):
        return tuple(torch.cat(pair, -1) for pair in zip(one, other, strict=True))
    return torch.cat((one, other), -1)
