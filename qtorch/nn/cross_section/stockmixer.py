"""StockMixer: MLPs over features, over time, and over a fixed universe of instruments."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network

_FAR = 1e4  # between two elements of a softmax of which one gets nothing


class StockMixer(Network):
    """Mix features and steps of each instrument, then mix instruments through market states.

    Fan and Shen, "StockMixer: A Simple Yet Strong MLP-Based Architecture for Stock Price
    Forecasting", AAAI 2024. Instruments influence each other through `market_dim` market states,
    with weights to and from each of the `num_instruments` instruments of the universe (filled in
    from the dataset, as is `step_len`). The extra `instrument [G, N]` selects the weights of each
    row. Follows the authors' model.py with one coarser scale. Differences: the authors assume that
    the whole universe is present every day, while here the market states and the norm are computed
    over the day's instruments, so that neither absent instruments nor padding count; the coarser
    scale has T / 2 steps for any T; `dropout` (the authors use none) and `num_outputs`.

    The authors' network gives a price, and the score is its return, price / last close - 1. This
    is `price_head`: `close_column` names the feature with the close (`close_index`, its position,
    is filled in from the dataset). It must be a price up to a positive factor of the instrument,
    such as `$close/Ref($close, 0)`, so no processor may centre it, and the label a return that is
    not normalised either. The score is 0 where the close is 0, which stands for a missing one.
    Without `price_head`, the network's output is the score.
    """

    cross_section = True
    extras: ClassVar[tuple[str, ...]] = ("instrument",)

    def __init__(
        self,
        d_feat: int,
        step_len: int,
        num_instruments: int,
        market_dim: int = 20,
        dropout: float = 0.0,
        num_outputs: int = 1,
        *,
        price_head: bool = False,
        close_column: str | None = None,
        close_index: int | None = None,
    ) -> None:
        super().__init__(num_outputs)
        if price_head and close_index is None:
            raise ValueError(
                "price_head=True needs the close: pass close_column, the name of its feature (or "
                "close_index, its position)."
            )
        if close_index is not None and not 0 <= close_index < d_feat:
            raise ValueError(f"close_index is {close_index}; expected 0 to {d_feat - 1}.")
        self.price_head, self.close_index = price_head, close_index
        if step_len < 2:
            raise ValueError(
                f"step_len is {step_len}; expected at least 2, for a coarser time scale."
            )
        coarse = step_len // 2
        length = 2 * step_len + coarse
        self.conv = nn.Conv1d(d_feat, d_feat, kernel_size=2, stride=2)
        self.fine, self.coarse = TimeMixer(step_len, d_feat), TimeMixer(coarse, d_feat)
        self.channel_fc = nn.Linear(d_feat, 1)
        self.dropout = nn.Dropout(dropout)
        self.stock_mixer = InstrumentMixer(num_instruments, market_dim)
        self.time_fc = nn.Linear(length, num_outputs)
        self.time_fc_ = nn.Linear(length, num_outputs)

    def forward(self, x: Tensor, mask: Tensor, instrument: Tensor) -> Tensor:
        """Map `x [G, N, T, F]`, `mask [G, N]`, `instrument [G, N]` to scores `[G, N(, Q)]`."""
        window = x.flatten(0, 1)  # [G * N, T, F]
        half = self.conv(window.transpose(1, 2)).transpose(1, 2)  # [G * N, T / 2, F]
        scales = torch.cat((window, self.fine(window), self.coarse(half)), 1)
        own = self.channel_fc(scales).squeeze(-1).unflatten(0, x.shape[:2])  # [G, N, L]
        own = self.dropout(own)
        market = self.stock_mixer(own, mask, instrument)
        # One product for both layers.
        weight = torch.cat((self.time_fc.weight, self.time_fc_.weight), 1)
        bias = self.time_fc.bias + self.time_fc_.bias
        output = F.linear(torch.cat((own, market), -1), weight, bias)
        if self.price_head:
            close = x[:, :, -1, self.close_index, None]
            has_close = close != 0
            change = output / close.where(has_close, torch.ones_like(close)) - 1
            output = change.where(has_close, torch.zeros_like(change))
        return self.scores(output)


class TimeMixer(nn.Module):
    """Mix steps causally, then features, with residuals: `[B, T, F]` to `[B, T, F]`."""

    def __init__(self, steps: int, channels: int) -> None:
        super().__init__()
        self.LN_1, self.LN_2 = (nn.LayerNorm([steps, channels]) for _ in range(2))
        self.over_time = CausalLinear(steps)
        self.over_channels = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.LN_2(self.over_time(self.LN_1(x)) + x)
        return x + self.over_channels(x)


class CausalLinear(nn.Module):
    """A linear layer over the steps of `[B, T, F]` in which each step depends on no later step."""

    causal_mask: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("causal_mask", torch.ones(steps, steps).tril(), persistent=False)
        limit = torch.arange(1, steps + 1, dtype=torch.float32)[:, None].rsqrt()
        self.weight = nn.Parameter((2 * torch.rand(steps, steps) - 1) * limit * self.causal_mask)
        self.bias = nn.Parameter((2 * torch.rand(steps) - 1) * limit[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        # From the left: a linear layer over the last axis would need copies of x and its result.
        weight = (self.weight * self.causal_mask).expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x)


class InstrumentMixer(nn.Module):
    """Map instruments to market states and back, with separate weights for each instrument."""

    def __init__(self, num_instruments: int, market_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_instruments)
        self.dense1 = nn.Linear(num_instruments, market_dim)
        self.dense2 = nn.Linear(market_dim, num_instruments)

    def forward(self, x: Tensor, mask: Tensor, instrument: Tensor) -> Tensor:
        """Map `x [G, N, L]`, `mask [G, N]`, `instrument [G, N]` to `[G, N, L]`."""
        # One look-up for all weights, as of embeddings: its gradient is a single operation, whose
        # result on a GPU is always the same.
        weights = _InstrumentWeights.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            instrument, mask, self.dense1.weight, self.norm.weight, self.norm.bias,
            self.dense2.bias, self.dense2.weight,
        )  # fmt: skip
        num_states = self.dense2.in_features
        to_market, scale, shift, dense2_bias, from_market = torch.split(
            weights, [num_states, 1, 1, 1, num_states], -1
        )  # [G, N, 1 or K]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            # Equal shares of the day's instruments, and zero for padding.
            share = torch.softmax(mask * _FAR, 1, dtype=x.dtype)
            x = _DayNorm.apply(x, share, scale, shift, self.norm.eps)[0]  # type: ignore[no-untyped-call]  # untyped in torch
        states = torch.baddbmm(self.dense1.bias, x.transpose(1, 2), to_market)  # [G, L, K]
        return torch.baddbmm(
            dense2_bias, from_market, F.hardswish(states).transpose(1, 2)
        )  # [G, N, L]


class _InstrumentWeights(torch.autograd.Function):
    """The weights `[G, N, C]` of `instrument [G, N]`, zero where `mask [G, N]` is False.

    Joins those to the K market states `[K, I]`, three vectors `[I]`, and those from the states
    `[I, K]`, of all I instruments. Its gradient has the memory that most weights have, so that
    they need no copy of their part. There, it relies on a loss that ignores padding.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(instrument: Tensor, mask: Tensor, *parts: Tensor) -> Tensor:
        to_market, *vectors, from_market = parts
        table = torch.cat((to_market.t(), *(v[:, None] for v in vectors), from_market), 1)
        return F.embedding(instrument, table) * mask[..., None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        instrument, *_, from_market = inputs
        ctx.num_instruments, ctx.num_states = from_market.shape
        ctx.save_for_backward(instrument)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (instrument,) = ctx.saved_tensors
        table_gradient = torch.ops.aten.embedding_dense_backward(
            gradient, instrument, ctx.num_instruments, -1, False
        )  # [I, C]
        num_states = ctx.num_states
        rows, from_market = torch.split(table_gradient, [num_states + 3, num_states], -1)
        rows = rows.t().contiguous()  # [K + 3, I]
        return None, None, rows[:num_states], *rows[num_states:].unbind(0), from_market


class _DayNorm(torch.autograd.Function):
    """Normalize `x [G, N, L]` over each day's instruments, then scale and shift it.

    `share [G, N]` are the weights of the mean, zero for padding; `scale` and `shift` `[G, N, 1]`
    are zero there. Returns the result, and what the gradient needs, which takes
    half as many operations as the gradients of its parts.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, share: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        share = share[:, None]
        x = x - share @ x
        factor = (share @ x.square() + eps).rsqrt()  # [G, 1, L]
        normal = x * factor
        return torch.addcmul(shift, normal, scale), normal, factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _, share, scale, _, _ = inputs
        ctx.save_for_backward(share, scale, *output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        share, scale, normal, factor = ctx.saved_tensors
        to_scale = gradient * normal
        by_instrument = scale.transpose(1, 2)  # [G, 1, N]
        # What the mean and the variance of the day pass on to its instruments.
        passed_on = torch.addcmul(by_instrument @ gradient, normal, by_instrument @ to_scale)
        x_gradient = torch.addcmul(gradient * scale, share[..., None], passed_on, value=-1) * factor
        scale_gradient, shift_gradient = (g.sum(-1, keepdim=True) for g in (to_scale, gradient))
        return x_gradient, None, scale_gradient, shift_gradient, None
