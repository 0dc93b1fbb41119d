"""StockMixer: perceptrons over features, over time, and over a fixed universe of instruments."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.network import Network


class StockMixer(Network):
    """Each instrument's window mixed by itself, and what all instruments do to each other.

    Fan and Shen, "StockMixer: A Simple Yet Strong MLP-Based Architecture for Stock Price
    Forecasting", AAAI 2024. The influence goes through `market_dim` states of the market, with a
    weight to and from each of the `num_instruments` of the universe (filled from the data, as is
    `step_len`); `instrument [G, N]` says whose weights a row has. Follows the authors' model.py
    with one coarser scale. Differences: the authors' universe is whole on every day; here the
    states are sums over the instruments of the day and the norm is taken over them, so that
    neither absent instruments nor padding count; a coarser scale of T / 2 steps for any T;
    `dropout` (the authors apply none) and `num_outputs`.
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
    ) -> None:
        super().__init__(num_outputs)
        if step_len < 2:
            raise ValueError(f"a window of {step_len} step has no coarser scale; give 2 or more.")
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
        """`x [G, N, T, F]`, `mask` and `instrument [G, N]` to `[G, N]` or `[G, N, Q]`."""
        window = x.flatten(0, 1)  # [G * N, T, F]
        half = self.conv(window.transpose(1, 2)).transpose(1, 2)  # [G * N, T / 2, F]
        mixed = torch.cat((window, self.fine(window), self.coarse(half)), 1)
        own = self.channel_fc(mixed)[..., 0].unflatten(0, x.shape[:2])  # [G, N, L]
        own = self.dropout(own)
        others = self.stock_mixer(own, mask, instrument)
        return self.scores(self.time_fc(own) + self.time_fc_(others))


class CausalLinear(nn.Module):
    """A linear layer over the last axis in which each step sees itself and what came before."""

    seen: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(steps, steps).tril(), persistent=False)
        reach = torch.arange(1, steps + 1, dtype=torch.float32)[:, None].rsqrt()
        self.weight = nn.Parameter((2 * torch.rand(steps, steps) - 1) * reach * self.seen)
        self.bias = nn.Parameter((2 * torch.rand(steps) - 1) * reach[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.seen, self.bias)


class TimeMixer(nn.Module):
    """Steps mixed causally, then features, each beside what came in: `[B, T, F]` to the same."""

    def __init__(self, steps: int, channels: int) -> None:
        super().__init__()
        self.LN_1, self.LN_2 = (nn.LayerNorm([steps, channels]) for _ in range(2))
        self.over_time = CausalLinear(steps)
        self.over_channels = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        over_time = self.over_time(self.LN_1(x).transpose(1, 2)).transpose(1, 2)
        x = self.LN_2(over_time + x)
        mixed: Tensor = x + self.over_channels(x)
        return mixed


class InstrumentMixer(nn.Module):
    """To states of the market and back: a row and a column of weights for each instrument."""

    def __init__(self, num_instruments: int, market_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_instruments)
        self.dense1 = nn.Linear(num_instruments, market_dim)
        self.dense2 = nn.Linear(market_dim, num_instruments)

    def forward(self, x: Tensor, mask: Tensor, instrument: Tensor) -> Tensor:
        """`x [G, N, L]`, `mask [G, N]`, `instrument [G, N]` to `[G, N, L]`."""
        there = mask[..., None].to(x.dtype)
        count = there.sum(1, keepdim=True).clamp(min=1)
        x = (x - (x * there).sum(1, keepdim=True) / count) * there
        x = x / (x.square().sum(1, keepdim=True) / count + self.norm.eps).sqrt()
        x = x * self.norm.weight[instrument][..., None] + self.norm.bias[instrument][..., None]
        into = self.dense1.weight.t()[instrument]  # [G, N, K]
        states = (x * there).transpose(1, 2) @ into + self.dense1.bias  # [G, L, K]
        back = self.dense2.weight[instrument] @ F.hardswish(states).transpose(1, 2)  # [G, N, L]
        return back + self.dense2.bias[instrument][..., None]
