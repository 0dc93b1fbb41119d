"""IGMTF: attend to the most similar instruments of the most similar past days."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section.layers import exact_similarities, masked_mean, newest_states
from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers

NO_NEIGHBOR = -2.0  # below any cosine


class IGMTF(Network):
    """Recurrent states of a day, combined with similar states from a bank of past days.

    For each day, the `k_day` most similar days of the bank are looked up, and in them the
    `n_neighbor` most similar instruments for each instrument.

    Xu et al., "Instance-wise Graph-based Framework for Multivariate Time Series Forecasting",
    2021. Corresponds to Qlib's pytorch_igmtf.py, with the same layer names. The bank is stored
    in buffers: `bank [D, N, H]`, `bank_mask [D, N]`, `bank_day [D, H]`. `qtorch.model.IGMTFModule`
    writes it at the start of each epoch. It is saved with the weights, and prediction uses it. An
    empty bank contributes nothing.

    Differences: the best epoch predicts with the bank that it was validated with (Qlib rebuilds
    the bank for prediction); the unused `fc_output` is left out; batches are true days with
    padding masked; `k_day` and `n_neighbor` are constructor arguments.
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
        self.reset_bank(1, 1)

    def reset_bank(self, num_days: int, width: int) -> None:
        """Replace the bank by an empty one for `num_days` days of at most `width` instruments."""
        zeros, size = self.project1.weight.new_zeros, self.hidden_size
        self.register_buffer("bank", zeros(num_days, width, size))
        self.register_buffer("bank_mask", zeros(num_days, width, dtype=torch.bool))
        self.register_buffer("bank_day", zeros(num_days, size))

    def states(self, x: Tensor) -> Tensor:
        """Return the states that the bank stores: `x [G, N, T, F]` to `[G, N, H]`."""
        return self.lins(newest_states(self.rnn, x))

    @torch.no_grad()
    def write_bank(self, start: int, x: Tensor, mask: Tensor) -> None:
        """Write the states of the days `x [G, N, T, F]`, `mask [G, N]` to the bank.

        They become its days `start` to `start + G - 1`.
        """
        states, (num_days, width) = self.states(x), mask.shape
        rows = slice(start, start + num_days)
        self.bank[rows, :width], self.bank_mask[rows, :width] = states * mask[..., None], mask
        self.bank_day[rows] = masked_mean(states, mask)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map `x [G, N, T, F]`, `mask [G, N]` to scores `[G, N]` or `[G, N, Q]`."""
        state = self.states(x)  # [G, N, H]
        day_similarity = exact_similarities(masked_mean(state, mask), self.bank_day)  # [G, D]
        days = day_similarity.topk(min(self.k_day, day_similarity.shape[-1]), -1).indices  # [G, k]
        # The bank's states went through `lins` before; Qlib, too, applies it once more.
        candidates = self.project2(self.lins(self.bank[days].flatten(1, 2)))  # [G, C, H]
        is_instrument = self.bank_mask[days].flatten(1, 2)  # [G, C]
        similarity = exact_similarities(self.project1(state), candidates).masked_fill(
            ~is_instrument[:, None], NO_NEIGHBOR
        )
        best, index = similarity.topk(min(self.n_neighbor, similarity.shape[-1]), -1)  # [G, N, n]
        # Divided by `n_neighbor` even if there are fewer neighbors, as in Qlib.
        weight = torch.where(best > NO_NEIGHBOR / 2, best, 0.0) / self.n_neighbor
        first = torch.arange(x.shape[0], device=x.device)[:, None, None] * candidates.shape[1]
        # A look-up as of embeddings: on a GPU the gradient of `gather` depends on chance.
        neighbors = F.embedding(index + first, candidates.flatten(0, 1))  # [G, N, n, H]
        neighbor_state = (weight[..., None] * neighbors).sum(-2)
        return self.scores(self.fc_out_pred(torch.cat((state, neighbor_state), -1)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}bank_mask" in state_dict:  # its size depends on the train segment
            self.reset_bank(*state_dict[f"{prefix}bank_mask"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
