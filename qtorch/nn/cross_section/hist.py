"""HIST: information shared through predefined and hidden concepts, and individual information."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.nn.cross_section.layers import (
    newest_states,
    own_similarities,
    similarity_and_lengths,
    similarity_gradients,
)
from qtorch.nn.network import Network
from qtorch.nn.recurrent import recurrent_layers


class HIST(Network):
    """Score from three doubly residual modules: concepts, hidden concepts, individual information.

    Xu et al., "HIST: A Graph-based Framework for Stock Trend Forecasting via Mining
    Concept-Oriented Shared Information", 2021. Corresponds to Qlib's pytorch_hist.py, with the
    same layer names. The concept memberships are the extra `concept [G, N, K]` (0 or 1, as of the
    sample's date; see `qtorch.data.dataset.extras.Concepts`). `num_concepts` is filled in from the
    dataset; no weight depends on it.

    Differences: memberships are those of each day (Qlib downloads one current matrix for all
    years, and gives row 733 to unknown instruments); empty concepts are masked instead of
    removed, and "empty" means without members, not with states that happen to sum to zero; six
    unused layers of Qlib's are left out; it also runs on the CPU (Qlib's requires a GPU).
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
        """Map `x [G, N, T, F]`, `mask [G, N]`, `concept [G, N, K]` to scores `[G, N(, Q)]`."""
        if self.num_concepts is not None and concept.shape[-1] != self.num_concepts:
            raise ValueError(
                f"got {concept.shape[-1]} concepts, but num_concepts is {self.num_concepts}."
            )
        state = newest_states(self.rnn, x)  # [G, N, H]
        explicit = self.fc_es(_concept_states(state, concept * mask[..., None]))
        residual = state - self.fc_es_back(explicit)
        # Padding, as zeros, is similar to nothing.
        hidden = self.fc_is(_hidden_concept_states(residual * mask[..., None]))
        own = residual - self.fc_is_back(hidden)
        # One product for the last layers of the three modules.
        layers = self.fc_es_fore, self.fc_is_fore, self.fc_indi
        weights = torch.stack([layer.weight for layer in layers])
        biases = torch.stack([layer.bias for layer in layers])
        inputs = torch.stack((explicit, hidden, own)).flatten(1, 2)  # [3, G * N, H]
        parts = torch.baddbmm(biases[..., None], weights, inputs.transpose(1, 2))  # [3, H, G * N]
        return self.scores(self.fc_out(F.leaky_relu(parts).sum(0).t()).unflatten(0, x.shape[:2]))


def _square(hidden_size: int) -> nn.Linear:
    layer = nn.Linear(hidden_size, hidden_size)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def _concept_states(state: Tensor, concept: Tensor) -> Tensor:
    """Return each instrument's attention over the states of predefined concepts, `[G, N, H]`.

    `state [G, N, H]`, `concept [G, N, K]` 0 or 1.
    """
    num_members = concept.sum(1, keepdim=True)  # [G, 1, K]
    return _attend_to_concepts(state, concept / (num_members + 1), num_members == 0)


def _hidden_concept_states(state: Tensor) -> Tensor:
    """Return each instrument's attention over hidden concepts, `[G, N, H]`.

    Each instrument defines one hidden concept. Its members are the instruments whose most similar
    other instrument it is, and the instrument itself if there are any.
    """
    index = torch.arange(state.shape[1], device=state.device)
    is_self = index[:, None] == index
    similarity, length = own_similarities(state)
    # An instrument without positive similarity to another joins no concept: the tiny number on the
    # diagonal is its maximum then.
    tiny = torch.finfo(similarity.dtype).tiny
    concept = similarity.detach().masked_fill(is_self, tiny).argmax(-1, keepdim=True)  # [G, N, 1]
    is_member = (concept == index) | is_self  # [G, N, N], concepts last
    is_empty = is_member.sum(1, keepdim=True) < 2  # [G, 1, N]; no member but itself
    # Of bools, `<=` is "not the first, or the second", in one operation.
    member = similarity.masked_fill(is_member <= is_empty, 0.0)
    return _attend_to_concepts(state, member, is_empty, length)


def _attend_to_concepts(
    state: Tensor, member: Tensor, is_empty: Tensor, length: Tensor | None = None
) -> Tensor:
    """Attend from instruments `state [G, N, H]` to K concepts by cosine similarity.

    A concept's state is the sum of the instruments' with their weights `member [G, N, K]`.
    `is_empty [G, 1, K]` masks concepts out. Their weights are zero, and so is the result if all
    are empty. `length [G, N, 1]` are the lengths of the states if they are known and positive.
    """
    with torch.autocast(state.device.type, enabled=False):
        precision = torch.promote_types(state.dtype, torch.float32)
        state, member = state.to(precision), member.to(precision)
        return _ConceptAttention.apply(state, member, is_empty, length)[0]  # type: ignore[no-untyped-call]  # untyped in torch


class _ConceptAttention(torch.autograd.Function):
    """`_attend_to_concepts`, with half the operations that the gradients of its parts need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        state: Tensor, member: Tensor, is_empty: Tensor, length: Tensor | None
    ) -> tuple[Tensor, ...]:
        concept = member.transpose(-1, -2) @ state  # [G, K, H]
        similarity, lengths = similarity_and_lengths(state, concept, length)
        lengths = lengths if length is None else lengths[1:]  # no input may be an output
        lowest = torch.finfo(similarity.dtype).min
        share = torch.softmax(similarity.masked_fill(is_empty, lowest), -1)
        return share @ concept, concept, share, similarity, *lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        state, member, _, length = inputs
        _, concept, share, similarity, *lengths = output
        ctx.is_length_positive = length is not None
        lengths = lengths if length is None else [length, *lengths]
        ctx.save_for_backward(state, member, concept, share, similarity, *lengths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        state, member, concept, share, *similarity = ctx.saved_tensors
        # The share of an empty concept is zero: its similarity has no gradient.
        to_similarity = torch._softmax_backward_data(
            gradient @ concept.transpose(-1, -2), share, -1, share.dtype
        )
        to_state, to_concept = similarity_gradients(
            to_similarity, state, concept, *similarity,
            y_gradient=share.transpose(-1, -2) @ gradient, is_x_positive=ctx.is_length_positive,
        )  # fmt: skip
        to_state = torch.baddbmm(to_state, member, to_concept)
        to_member = state @ to_concept.transpose(-1, -2) if ctx.needs_input_grad[1] else None
        return to_state, to_member, None, None
