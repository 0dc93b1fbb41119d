"""IGMTF: an instrument's state beside the most similar states of the most similar past days."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtorch.nn.cross_section import cosines, masked_mean, newest_states
from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers

NOBODY = -2.0  # below any cosine


class IGMTF(Network):
    """Looks up past days like this one, and in them instruments like each of this day's.

    Xu et al., "Instance-wise Graph-based Framework for Multivariate Time Series Forecasting",
    2021. Answers to Qlib's pytorch_igmtf.py; the layers have the same names. The bank of states
    is buffers: `bank [D, N, H]`, `bank_mask [D, N]`, `bank_day [D, H]`. `qtorch.model.IGMTFModule`
    writes it as each epoch begins; it is saved with the weights and predicts with them. A bank
    that is empty adds nothing.

    Differences: the epoch that is kept predicts with the bank it was validated with (Qlib makes
    another one to predict); `fc_output`, which nothing uses, is left out; days are true days
    with padding masked; `k_day` and `n_neighbor` are arguments of the constructor.
    """

    cross_section = True

    bank: Tensor
    bank_mask: Tensor
    bank_day: Tensor

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        base_model: str = "GRU",
        k_day: int = 10,
        n_neighbor: int = 10,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        if k_day < 1 or n_neighbor < 1:
            raise ValueError(f"k_day {k_day} and n_neighbor {n_neighbor} must be at least 1.")
        self.k_day, self.n_neighbor, self.hidden_size = k_day, n_neighbor, hidden_size
        self.rnn = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.lins = nn.Sequential()
        for k in range(2):
            self.lins.add_module(f"linear{k}", nn.Linear(hidden_size, hidden_size))
            self.lins.add_module(f"leakyrelu{k}", nn.LeakyReLU())
        self.project1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.project2 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.fc_out_pred = nn.Linear(2 * hidden_size, num_outputs)
        self.reserve(1, 1)

    def reserve(self, num_days: int, width: int) -> None:
        """An empty bank for so many days of at most `width` instruments."""
        device = self.project1.weight.device
        form = (num_days, width)
        self.register_buffer("bank", torch.zeros(*form, self.hidden_size, device=device))
        self.register_buffer("bank_mask", torch.zeros(form, dtype=torch.bool, device=device))
        self.register_buffer("bank_day", torch.zeros(num_days, self.hidden_size, device=device))

    def states(self, x: Tensor) -> Tensor:
        """What the bank holds: `x [G, N, T, F]` to `[G, N, H]`."""
        states: Tensor = self.lins(newest_states(self.rnn, x))
        return states

    @torch.no_grad()
    def keep(self, start: int, x: Tensor, mask: Tensor) -> None:
        """Write the states of the days `x [G, N, T, F]`, `mask [G, N]` as the bank's days from
        `start` on."""
        states, (num, width) = self.states(x), mask.shape
        rows = slice(start, start + num)
        self.bank[rows, :width], self.bank_mask[rows, :width] = states * mask[..., None], mask
        self.bank_day[rows] = masked_mean(states, mask)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x [G, N, T, F]`, `mask [G, N]` to `[G, N]` or `[G, N, Q]`."""
        state = self.states(x)  # [G, N, H]
        days = _alike(masked_mean(state, mask), self.bank_day)  # [G, D]
        near = days.topk(min(self.k_day, days.shape[-1]), -1).indices  # [G, k]
        kept = self.project2(self.lins(self.bank[near].flatten(1, 2)))  # [G, C, H]
        there = self.bank_mask[near].flatten(1, 2)  # [G, C]
        alike = _alike(self.project1(state), kept).masked_fill(~there[:, None], NOBODY)
        most, which = alike.topk(min(self.n_neighbor, alike.shape[-1]), -1)  # [G, N, n]
        share = torch.where(most > NOBODY / 2, most, 0.0) / self.n_neighbor
        place = which.flatten(1)[..., None].expand(-1, -1, kept.shape[-1])
        found = kept.gather(1, place).unflatten(1, which.shape[1:])  # [G, N, n, H]
        met = (share[..., None] * found).sum(-2)
        return self.scores(self.fc_out_pred(torch.cat((state, met), -1)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}bank_mask" in state_dict:  # a bank is as large as its training was long
            self.reserve(*state_dict[f"{prefix}bank_mask"].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """Cosines in full precision: who is nearest is a choice, which rounding would make."""
    with torch.autocast(x.device.type, enabled=False):
        return cosines(x.float(), y.float())
