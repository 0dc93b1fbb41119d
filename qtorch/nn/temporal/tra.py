"""TRA: several predictors, and a router that assigns each sample to one of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers
from qtorch.nn.transformer import PositionalEncoding, encoder

SOURCES = ("LR", "TPE", "LR_TPE")
BACKBONES = ("RNN", "Transformer")


class TRA(Network):
    """Temporal Routing Adaptor: predictors for different trading patterns on one backbone.

    A router selects one predictor for each sample from the backbone's state (`src_info` "LR"),
    from the past errors of the predictors ("TPE"), or from both ("LR_TPE").

    Lin et al., "Learning Multiple Stock Trading Patterns with Temporal Routing Adaptor and
    Optimal Transport", KDD 2021. Corresponds to Qlib's pytorch_tra.py, with the same layer names
    (its backbone is `model`, its adaptor this network).

    The extra `errors [B, lookback, num_states]` holds the errors on the sample's instrument on
    the days from `date - label_horizon - lookback + 1` to `date - label_horizon`, scaled to [0, 1]
    over the predictors, and zero where unknown. A day's label is known `label_horizon` days later,
    so the errors contain no information from after `date`. `label_horizon` is filled in from the
    dataset if the dataset knows it. `qtorch.model.TRAModule` trains the network and stores the
    errors; `LightningModel.predict` computes the errors that its samples need.

    Differences: all label columns share one route; the steps of `errors` are calendar days (Qlib
    counts the instrument's rows); routes are sampled in the training step only, while `forward`
    takes the most likely one; positional encodings are added without dropout.
    """

    extras: ClassVar[tuple[str, ...]] = ("errors",)

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        backbone: str = "RNN",
        rnn_arch: str = "LSTM",
        use_attn: bool = True,
        nhead: int = 2,
        num_states: int = 3,
        router_size: int = 16,
        router_arch: str = "GRU",
        tau: float = 1.0,
        src_info: str = "LR_TPE",
        lookback: int = 58,
        label_horizon: int = 2,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if num_states < 2:
            raise ValueError(f"num_states is {num_states}; expected at least 2 predictors.")
        if lookback < 1 or label_horizon < 1:
            raise ValueError(
                f"lookback is {lookback}, label_horizon is {label_horizon}; expected at least 1."
            )
        for name, value, choices in (
            ("src_info", src_info, SOURCES),
            ("backbone", backbone, BACKBONES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        self.num_states, self.tau, self.src_info = num_states, tau, src_info
        self.lookback, self.label_horizon = lookback, label_horizon
        self.model: _Recurrent | _Attention
        if backbone == "RNN":
            self.model = _Recurrent(d_feat, hidden_size, num_layers, dropout, rnn_arch, use_attn)
        else:
            self.model = _Attention(d_feat, hidden_size, num_layers, dropout, nhead)
        width = self.model.output_size
        self.predictors = nn.Linear(width, num_states * num_outputs)
        router_input_size = width if "LR" in src_info else 0
        if "TPE" in src_info:
            self.router = recurrent_layers(router_arch, num_states, router_size)
            router_input_size += router_size
        self.fc = nn.Linear(router_input_size, num_states)

    def predictions_and_logits(self, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of all predictors `[B, num_states, Q]`, and the router's logits
        `[B, num_states]`."""
        state = self.model(x)  # [B, H]
        router_inputs = [state] if "LR" in self.src_info else []
        if "TPE" in self.src_info:
            router_inputs.append(self.router(errors.to(state.dtype))[0][:, -1])
        return self.predictions(state), self.fc(torch.cat(router_inputs, -1)) / self.tau

    def predictions(self, state: Tensor) -> Tensor:
        """Return the predictions `[B, num_states, Q]` for states `[B, H]` of the backbone."""
        return self.predictors(state).reshape(-1, self.num_states, self.num_outputs)

    def mix_predictions(self, predictions: Tensor, share: Tensor) -> Tensor:
        """Return predictions `[B, num_states, Q]` weighted by `share [B, num_states]` as scores."""
        return self.scores((predictions * share[..., None]).sum(-2))

    def forward(self, x: Tensor, errors: Tensor) -> Tensor:
        """Map `x [B, T, F]`, `errors [B, lookback, num_states]` to scores `[B]` or `[B, Q]`."""
        predictions, logits = self.predictions_and_logits(x, errors)
        share = logits.softmax(-1)
        best = logits.argmax(-1, keepdim=True)
        is_best = best == torch.arange(self.num_states, device=logits.device)
        # Straight-through estimator: the value of the hard choice, the gradient of the softmax.
        return self.mix_predictions(predictions, is_best.to(share.dtype) + (share - share.detach()))


class _Recurrent(nn.Module):
    """Recurrent backbone: the mean of the layers' last states.

    With `use_attn`, it is concatenated with an attention-weighted sum of all states.
    """

    def __init__(
        self, d_feat: int, hidden: int, num_layers: int, dropout: float, arch: str, use_attn: bool
    ) -> None:
        super().__init__()
        is_narrow = hidden < d_feat
        self.input_proj = nn.Linear(d_feat, hidden) if is_narrow else nn.Identity()
        self.rnn = recurrent_layers(arch, min(d_feat, hidden), hidden, num_layers, dropout)
        self.use_attn = use_attn
        if use_attn:
            self.W = nn.Linear(hidden, hidden)
            self.u = nn.Linear(hidden, 1, bias=False)
        self.output_size = 2 * hidden if use_attn else hidden

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.rnn(self.input_proj(x))  # [B, T, H]
        last_state = (last[0] if isinstance(last, tuple) else last).mean(0)  # [B, H]
        if not self.use_attn:
            return last_state
        share = self.u(torch.tanh(self.W(states))).softmax(1)  # [B, T, 1]
        return torch.cat((last_state, (states * share).sum(1)), -1)


class _Attention(nn.Module):
    """Transformer backbone: the encoder's state of the newest step."""

    def __init__(
        self, d_feat: int, hidden: int, num_layers: int, dropout: float, nhead: int
    ) -> None:
        super().__init__()
        self.pe = PositionalEncoding(d_feat)
        self.input_proj = nn.Linear(d_feat, hidden)
        self.encoder = encoder(hidden, nhead, num_layers, 4 * hidden, dropout, activation="relu")
        self.output_size = hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.input_proj(self.pe(x)))[:, -1]  # [B, H]


def minmax(values: Tensor) -> Tensor:
    """Scale values to [0, 1] along the last axis, or to ones if they are all equal."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-12), 1.0)


def sinkhorn(cost: Tensor, is_sample: Tensor, num_iters: int = 3, epsilon: float = 0.1) -> Tensor:
    """Return a transport plan `[B, K]` between samples and predictors for `cost [B, K]`.

    Each sample's shares sum to one and are largest where its cost is lowest, while all predictors
    get about the same number of samples. Rows where `is_sample [B]` is False get zeros.

    Cuturi, "Sinkhorn Distances", 2013, with `num_iters` iterations and entropic regularization
    `epsilon`.
    """
    tiny = torch.finfo(cost.dtype).tiny
    plan = torch.exp(cost / -epsilon) * is_sample[:, None]
    for _ in range(num_iters):
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny)
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny)
    return plan
