"""TRA: several predictors, and a router that sends each sample to one of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers
from qtorch.nn.transformer import PositionalEncoding

SOURCES = ("LR", "TPE", "LR_TPE")
BACKBONES = ("RNN", "Transformer")


class TRA(Network):
    """Temporal Routing Adaptor: predictors for different trading patterns on one backbone. The
    router chooses one by the backbone's state (`src_info` "LR"), by the predictors' own past
    errors ("TPE"), or by both.

    Lin et al., "Learning Multiple Stock Trading Patterns with Temporal Routing Adaptor and
    Optimal Transport", KDD 2021. Answers to Qlib's pytorch_tra.py; the layers have the same names
    (its backbone is `model`, its adaptor this network). `errors [B, lookback, num_states]` are
    the errors of the sample's instrument on the days from `date - label_horizon - lookback + 1`
    to `date - label_horizon`, scaled to [0, 1] over the predictors; zeros where they are not
    known. A day's label is known `label_horizon` days later: nothing later than `date` is in them.
    It is filled from the dataset where that knows it. `qtorch.model.TRAModule` trains the network
    and keeps the errors; `LightningModel.predict` finds those that its samples need by itself.

    Differences: several label columns share one route; the steps of the errors are calendar days
    (Qlib counts the instrument's rows); the draw of a route in training is part of the training
    step, and here the likeliest is taken; positions are added without dropout.
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
            raise ValueError(f"num_states is {num_states}; a router chooses from 2 at least.")
        if lookback < 1 or label_horizon < 1:
            raise ValueError(
                f"lookback {lookback} and label_horizon {label_horizon} must be at least 1."
            )
        for name, value, known in (
            ("src_info", src_info, SOURCES),
            ("backbone", backbone, BACKBONES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        self.num_states, self.tau, self.src_info = num_states, tau, src_info
        self.lookback, self.label_horizon = lookback, label_horizon
        self.model: _Recurrent | _Attention
        if backbone == "RNN":
            self.model = _Recurrent(d_feat, hidden_size, num_layers, dropout, rnn_arch, use_attn)
        else:
            self.model = _Attention(d_feat, hidden_size, num_layers, dropout, nhead)
        width = self.model.output_size
        self.predictors = nn.Linear(width, num_states * num_outputs)
        seen = width if "LR" in src_info else 0
        if "TPE" in src_info:
            self.router = recurrent_layers(router_arch, num_states, router_size)
            seen += router_size
        self.fc = nn.Linear(seen, num_states)

    def patterns(self, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """What each predictor says `[B, num_states, Q]`, and the router's logits
        `[B, num_states]`."""
        state = self.model(x)  # [B, H]
        seen = [state] if "LR" in self.src_info else []
        if "TPE" in self.src_info:
            seen.append(self.router(errors.to(state.dtype))[0][:, -1])
        return self.predicted(state), self.fc(torch.cat(seen, -1)) / self.tau

    def predicted(self, state: Tensor) -> Tensor:
        """What each predictor says of states of the backbone: `[B, H]` to `[B, num_states, Q]`."""
        found: Tensor = self.predictors(state)
        return found.reshape(-1, self.num_states, self.num_outputs)

    def routed(self, found: Tensor, share: Tensor) -> Tensor:
        """The predictions `[B, num_states, Q]` weighted by `share [B, num_states]`."""
        return self.scores((found * share[..., None]).sum(-2))

    def forward(self, x: Tensor, errors: Tensor) -> Tensor:
        """`x [B, T, F]`, `errors [B, lookback, num_states]` to `[B]` or `[B, Q]`."""
        found, logits = self.patterns(x, errors)
        share = logits.softmax(-1)
        best = logits.argmax(-1, keepdim=True)
        chosen = best == torch.arange(self.num_states, device=logits.device)
        # The value of the choice, the gradient of the shares.
        return self.routed(found, chosen.to(share.dtype) + (share - share.detach()))


class _Recurrent(nn.Module):
    """The mean of the layers' last states beside, with `use_attn`, attention over all states."""

    def __init__(
        self, d_feat: int, hidden: int, num_layers: int, dropout: float, arch: str, use_attn: bool
    ) -> None:
        super().__init__()
        narrow = hidden < d_feat
        self.input_proj = nn.Linear(d_feat, hidden) if narrow else nn.Identity()
        self.rnn = recurrent_layers(arch, min(d_feat, hidden), hidden, num_layers, dropout)
        self.use_attn = use_attn
        if use_attn:
            self.W = nn.Linear(hidden, hidden)
            self.u = nn.Linear(hidden, 1, bias=False)
        self.output_size = 2 * hidden if use_attn else hidden

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.rnn(self.input_proj(x))  # [B, T, H]
        newest: Tensor = (last[0] if isinstance(last, tuple) else last).mean(0)  # [B, H]
        if not self.use_attn:
            return newest
        share = self.u(torch.tanh(self.W(states))).softmax(1)  # [B, T, 1]
        return torch.cat((newest, (states * share).sum(1)), -1)


class _Attention(nn.Module):
    """A Transformer's state of the newest step."""

    def __init__(
        self, d_feat: int, hidden: int, num_layers: int, dropout: float, nhead: int
    ) -> None:
        super().__init__()
        if hidden % nhead:
            raise ValueError(f"hidden_size {hidden} is not a multiple of nhead {nhead}.")
        self.pe = PositionalEncoding(d_feat)
        self.input_proj = nn.Linear(d_feat, hidden)
        layer = nn.TransformerEncoderLayer(hidden, nhead, 4 * hidden, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.output_size = hidden

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.encoder(self.input_proj(self.pe(x)))
        return states[:, -1]


def minmax(values: Tensor) -> Tensor:
    """Values scaled to [0, 1] along the last axis; ones where they are all equal."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-12), 1.0)


def sinkhorn(cost: Tensor, there: Tensor, num_iters: int = 3, epsilon: float = 0.1) -> Tensor:
    """A plan `[B, K]` that gives each sample shares of the predictors, most where the `cost [B,
    K]` is least, and each predictor about as many samples. Rows outside `there [B]` get none.

    Cuturi, "Sinkhorn Distances", 2013: entropy `epsilon`, so many rounds.
    """
    tiny = torch.finfo(cost.dtype).tiny
    plan = torch.exp(-cost / epsilon) * there[:, None]
    for _ in range(num_iters):
        plan = plan / plan.sum(0, keepdim=True).clamp(min=tiny)
        plan = plan / plan.sum(1, keepdim=True).clamp(min=tiny)
    return plan
