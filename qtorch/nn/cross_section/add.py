"""ADD: separate an instrument's excess-return signal from the state of the market."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtorch.nn.cross_section.layers import MaskCounts, MaskedBatchNorm
from qtorch.nn.network import Network
from qtorch.nn.recurrent import LSTMState, recurrent_layers, run_steps

NUM_MARKET_STATES = 3  # down, middle, up


class ADD(Network):
    """Recurrent encoder whose state is trained to carry no information about the market.

    Tang et al., "ADD: Augmented Disentanglement Distillation Framework for Improving Stock Trend
    Forecasting", 2020. Corresponds to Qlib's pytorch_add.py, with the same layer names. This
    network holds only the parts that predict, `enc_excess` and `pred_excess`. The parts that are
    only needed in training are in `Disentangler`, which `qtorch.model.ADDModule` trains alongside
    and which is not part of a fitted model.

    Differences: batches are whole days, and padding does not enter any statistic; batches hold
    several days, because the norm over a single day would remove what its instruments have in
    common; `num_outputs`. Like Qlib's version, this one omits the paper's self-distillation
    from earlier epochs and its data augmentation.
    """

    cross_section = True
    recurrent_layer = "enc_excess"

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
        self.disentangler_arguments = (
            d_feat,
            hidden_size,
            num_layers,
            dropout,
            base_model,
            num_outputs,
        )
        self.enc_excess = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.pred_excess = Head(hidden_size * num_layers, num_outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `x [G, N, T, F]`, `mask [G, N]` to scores `[G, N]` or `[G, N, Q]`."""
        # expand() does not change the mask. It tells torch.export that the sizes of mask and x are
        # equal, so that the exported program also accepts a day with a single instrument.
        return self.score_state(self.encode(x), mask.expand(x.shape[:2]))

    def encode(self, x: Tensor) -> Tensor | LSTMState:
        """Return the last state of all layers, `[L, G * N, H]` (for LSTM a tuple of two)."""
        return self.enc_excess(x.flatten(0, 1))[1]

    def score_state(self, state: Tensor | LSTMState, mask: Tensor) -> Tensor:
        """Return the scores `[G, N]` or `[G, N, Q]` for the output of `encode`."""
        return self.scores(self.pred_excess(concat_layers(state, mask), mask))

    def disentangler(self, dec_dropout: float = 0.0) -> Disentangler:
        """Return a new Disentangler with the sizes of this network."""
        return Disentangler(*self.disentangler_arguments, dec_dropout)


class DisentanglerOutput(NamedTuple):
    """Outputs of a Disentangler: logits `[G, N, 3]` of the market state, from the market encoder
    (`market`) and from the excess encoder (`adv_market`), scores `[G, N]` or `[G, N, Q]` from the
    market encoder (`adv_excess`), and windows `[G, N, T, F]` decoded from both states."""

    market: Tensor
    adv_market: Tensor
    adv_excess: Tensor
    reconstruction: Tensor


class Disentangler(nn.Module):
    """The market encoder, two adversaries and a decoder, with the names of Qlib's ADDModel.

    Each adversary predicts from one encoder's state what that state should not contain. The
    adversaries minimize their loss, while the encoders maximize it, because the gradient that
    reaches them is reversed and multiplied by `alpha`.
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
        self.pred_market = Head(width, NUM_MARKET_STATES)
        self.adv_market = Head(width, NUM_MARKET_STATES)
        self.adv_excess = Head(width, num_outputs)

    def forward(
        self, x: Tensor, mask: Tensor, excess: Tensor | LSTMState, alpha: float
    ) -> DisentanglerOutput:
        """Compute the training outputs for `x [G, N, T, F]`, `mask [G, N]`.

        `excess` is the result of the network's `encode(x)`.
        """
        market: Tensor | LSTMState = self.enc_market(x.flatten(0, 1))[1]
        excess_state, market_state = concat_layers(excess, mask), concat_layers(market, mask)
        reconstruction = self.dec(_concat_states(excess, market), x.shape[2])
        counts = MaskCounts.from_mask(mask, torch.float32) if self.training else mask
        adv_excess = self.adv_excess(reverse_gradient(market_state, alpha), counts)
        return DisentanglerOutput(
            market=self.pred_market(market_state, counts),
            adv_market=self.adv_market(reverse_gradient(excess_state, alpha), counts),
            adv_excess=adv_excess[..., 0] if self.num_outputs == 1 else adv_excess,
            reconstruction=reconstruction.unflatten(0, x.shape[:2]),
        )


class Head(nn.Sequential):
    """A hidden layer, batch normalization over the unpadded samples, and an output layer."""

    def __init__(self, width: int, outputs: int) -> None:
        norm = MaskedBatchNorm(width)
        super().__init__(nn.Linear(width, width), norm, nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, state: Tensor, mask: Tensor | MaskCounts) -> Tensor:  # type: ignore[override]  # also takes a mask
        """Map `state [G, N, width]`, `mask [G, N]` (or its counts) to `[G, N, outputs]`."""
        hidden, norm, act, out = self
        return out(act(norm(hidden(state), mask)))


class Decoder(nn.Module):
    """Autoregressive decoder of a window from a state: each step is the input of the next one."""

    def __init__(
        self, d_feat: int, hidden_size: int, num_layers: int, dropout: float, base_model: str
    ) -> None:
        super().__init__()
        self.rnn = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.fc = nn.Linear(hidden_size, d_feat)

    def forward(self, state: Any, num_steps: int) -> Tensor:
        """Decode the state of B samples to `num_steps` (T) steps `[B, T, F]`, oldest first."""
        hidden = state[0] if isinstance(state, tuple) else state
        first = hidden.new_zeros(hidden.shape[1], self.fc.out_features)
        return run_steps(self.rnn, first, state, num_steps, self.fc)


def reverse_gradient(x: Tensor, alpha: float) -> Tensor:
    """Return `x` unchanged, but multiply its gradient by -alpha in the backward pass.

    Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.
    """
    return _GradientReversal.apply(x, alpha)  # type: ignore[no-untyped-call]  # untyped in torch


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * grad, None


def concat_layers(state: Tensor | LSTMState, mask: Tensor) -> Tensor:
    """Concatenate the hidden states of all layers: `[L, G * N, H]` to `[G, N, L * H]`."""
    hidden = state[0] if isinstance(state, tuple) else state
    return hidden.transpose(0, 1).reshape(*mask.shape, -1)


def _concat_states(first: Any, second: Any) -> Any:
    """Concatenate two recurrent states along the hidden axis."""
    if isinstance(first, tuple):
        return tuple(torch.cat(pair, -1) for pair in zip(first, second, strict=True))
    return torch.cat((first, second), -1)
