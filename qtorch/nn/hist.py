"""HIST: what instruments share by known concepts, by hidden ones, and what is each one's own."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section import cosines, masked_softmax, newest_states
from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers


class HIST(Network):
    """Three doubly residual parts of an instrument's state: concepts, hidden concepts, itself.

    Xu et al., "HIST: A Graph-based Framework for Stock Trend Forecasting via Mining
    Concept-Oriented Shared Information", 2021. Answers to Qlib's pytorch_hist.py; the layers
    have the same names. The memberships are the extra `concept [G, N, K]` (0 and 1, as of the
    sample's date; `qtorch.data.extras.Concepts`), `num_concepts` is filled from the data; no
    weight depends on it.

    Differences: memberships of the day (Qlib downloads one matrix of today for all years, and
    instruments it does not know get the row 733); empty concepts are masked, not cut out, and
    "empty" means without members, not a sum of states that happens to be zero; the six layers
    of Qlib's that nothing uses are left out; it runs on the CPU (Qlib's asks for a GPU).
    """

    cross_section = True
    extras: ClassVar[tuple[str, ...]] = ("concept",)

    def __init__(
        self,
        d_feat: int = 6,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.0,
        base_model: str = "GRU",
        num_concepts: int | None = None,
        num_outputs: int = 1,
    ) -> None:
        super().__init__(num_outputs)
        self.num_concepts = num_concepts
        self.rnn = recurrent_layers(base_model, d_feat, hidden_size, num_layers, dropout)
        self.fc_es, self.fc_is = _square(hidden_size), _square(hidden_size)
        self.fc_es_fore, self.fc_is_fore = _square(hidden_size), _square(hidden_size)
        self.fc_es_back, self.fc_is_back = _square(hidden_size), _square(hidden_size)
        self.fc_indi = _square(hidden_size)
        self.fc_out = nn.Linear(hidden_size, num_outputs)

    def forward(self, x: Tensor, mask: Tensor, concept: Tensor) -> Tensor:
        """`x [G, N, T, F]`, `mask [G, N]`, `concept [G, N, K]` to `[G, N]` or `[G, N, Q]`."""
        if self.num_concepts is not None and concept.shape[-1] != self.num_concepts:
            raise ValueError(
                f"{concept.shape[-1]} concepts; this network was made for {self.num_concepts}."
            )
        state = newest_states(self.rnn, x)  # [G, N, H]
        shared = self.fc_es(_by_concepts(state, concept * mask[..., None]))
        rest = state - self.fc_es_back(shared)
        hidden = self.fc_is(_by_each_other(rest, mask))
        own = rest - self.fc_is_back(hidden)
        parts = torch.stack((self.fc_es_fore(shared), self.fc_is_fore(hidden), self.fc_indi(own)))
        return self.scores(self.fc_out(F.leaky_relu(parts).sum(0)))


def _square(hidden_size: int) -> nn.Linear:
    layer = nn.Linear(hidden_size, hidden_size)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def _by_concepts(state: Tensor, concept: Tensor) -> Tensor:
    """What instruments `[G, N, H]` know by their concepts' states, `concept [G, N, K]`."""
    members = concept.sum(1, keepdim=True)  # [G, 1, K]
    share = concept / (members * concept + 1)
    return _attended(state, share.transpose(-1, -2) @ state, members > 0)


def _by_each_other(state: Tensor, mask: Tensor) -> Tensor:
    """What instruments `[G, N, H]` know by hidden concepts: each instrument is one, and its
    members are itself and those that are most like it."""
    count = state.shape[1]
    place = torch.arange(count, device=state.device)
    itself = place[:, None] == place
    # Who is most like whom is a choice, which rounding would make for the network.
    with torch.autocast(state.device.type, enabled=False):
        alike = cosines(state.float(), state.float())
    # Not above zero is like nobody: a zero on the diagonal wins then, and counts for nothing.
    others = alike.masked_fill(itself | ~mask[:, None], 0.0)
    most, which = others.max(-1)  # [G, N]
    member = (which[..., None] == place) * (most * mask)[..., None]  # [G, N, N], by concept last
    chosen = member.sum(1) != 0  # [G, N]
    member = member + itself * (alike * chosen[:, None])
    return _attended(state, member.transpose(-1, -2) @ state, chosen[:, None])


def _attended(state: Tensor, concept: Tensor, there: Tensor) -> Tensor:
    """Concepts `[G, K, H]` seen by instruments `[G, N, H]`, more where they are alike;
    `there [G, 1, K]`."""
    return masked_softmax(cosines(state, concept), there).to(concept.dtype) @ concept
