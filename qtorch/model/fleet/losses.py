"""The losses of all members of a fleet, whose numbers may differ: weights of a sum, deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtorch.data.dataset.batch import Batch
from qtorch.data.transfer import send_to_device
from qtorch.metrics.loss import Loss
from qtorch.model.fleet.calls import call_for_members
from qtorch.model.fleet.member import Member
from qtorch.model.loop.module import ScoreModule

LABEL_TENSORS = ("date", "instrument", "y", "weight", "mask")


class MemberLosses:
    """The loss of each member; members with equal losses are computed at once.

    `network` is the network that all members have in common.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network, device
        self._modules: dict[str, ScoreModule] = {}
        self._texts: list[str] = []
        self._groups: dict[tuple[int, ...], tuple[list[tuple[str, Tensor]], Tensor]] = {}

    def set_members(self, members: Sequence[Member]) -> None:
        """Take the losses of the members of the stack, in their order."""
        self._texts, self._groups = [member.loss_text for member in members], {}
        for text, member in zip(self._texts, members, strict=True):
            if text not in self._modules:
                loss = member.loss
                loss = loss.to(self.device) if isinstance(loss, nn.Module) else loss
                self._modules[text] = ScoreModule(
                    self.network, loss, partial(_use_template, member), num_days=0
                )

    def select_modules(self, members: Sequence[int]) -> list[ScoreModule]:
        """Return the modules of the different losses of some members."""
        return [self._modules[text] for text in dict.fromkeys(self._texts[m] for m in members)]

    def sums(
        self,
        members: Sequence[int],
        scores: Tensor,
        tensors: Mapping[str, Tensor],
        *,
        is_shared: bool,
        is_complete: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return loss sums `[K]` and weight sums `[K]` of members with `scores [K, ...]`.

        `tensors` are those of a batch by name, with a member axis unless it `is_shared`.
        """
        labels = {name: tensors[name] for name in LABEL_TENSORS if name in tensors}
        groups, order = self._group(members)
        parts = []
        for text, rows in groups:
            module, part, group_scores = self._modules[text], labels, scores
            if len(groups) > 1:
                group_scores = scores.index_select(0, rows)
            if len(groups) > 1 and not is_shared:
                part = {name: t.index_select(0, rows) for name, t in labels.items()}

            def sums_of_member(
                state: dict[str, Tensor],
                score: Tensor,
                values: dict[str, Tensor],
                module: ScoreModule = module,
            ) -> tuple[Tensor, Tensor]:
                return member_sums(module, score, values, is_complete=is_complete)

            if is_complete and (sums := _complete_sums(module.loss, group_scores, part)):
                parts.append(sums)
                continue
            arguments: tuple[Any, ...] = {}, group_scores, part
            parts.append(
                call_for_members(sums_of_member, arguments, (0, 0, None if is_shared else 0), rows)
            )
        if len(parts) == 1:
            return parts[0]
        total, weight = (
            torch.cat(each).index_select(0, order) for each in zip(*parts, strict=True)
        )
        return total, weight

    def _group(self, members: Sequence[int]) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """Return each loss with the places of its members, and the order of all places."""
        key = tuple(members)
        if key not in self._groups:
            places: dict[str, list[int]] = {}
            for place, member in enumerate(members):
                places.setdefault(self._texts[member], []).append(place)
            all_places = torch.tensor([place for part in places.values() for place in part])
            groups = [
                (text, send_to_device(torch.tensor(part), self.device))
                for text, part in places.items()
            ]
            self._groups[key] = groups, send_to_device(all_places.argsort(), self.device)
        return self._groups[key]


def _complete_sums(
    loss: Any, scores: Tensor, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Return loss sums `[K]` and weight sums `[K]` of labels that are all there, without `vmap`.

    `tensors` have a member axis. None for a loss that is not one of single elements.
    """
    is_elementwise = isinstance(loss, Loss) and type(loss).sums is Loss.sums
    if not is_elementwise or tensors.keys() & {"weight", "mask"}:
        return None
    target = tensors["y"]
    if target.shape[-1] == 1 and scores.dim() < target.dim():
        target = target[..., 0]
    if scores.shape != target.shape:
        return None
    sums = loss.elementwise(scores, target).flatten(1).sum(1)
    return sums, torch.full_like(sums, float(target[0].numel()))


def member_sums(
    module: ScoreModule, score: Tensor, values: Mapping[str, Any], *, is_complete: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss sum and the weight sum of one member's scores.

    `values` are the tensors of its batch; its features are not used.
    """
    batch = Batch(**{**values, "x": score})
    is_complete = is_complete and batch.mask is None  # the members' numbers of samples may differ
    total, weight = module.loss_sums_from_scores(score, batch, complete=is_complete)
    if isinstance(weight, int):
        weight = torch.full((), float(weight), device=total.device)
    return total, weight


def _use_template(member: Member, parameters: Any) -> Any:
    return member.template
