"""Training step of ADARNN: it aligns the hidden states of several periods of the train segment."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, check_name
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples
from qtorch.model.loop.module import ScoreModule
from qtorch.nn.temporal.adarnn import ADARNN, DISTANCES, StepGates, step_distances

NUM_SLOTS = 10  # equal parts of the train days that domains are built from
CHUNK_SIZE = 8192
SPLITS = ("even", "diverse")
EPSILON = 1e-5


class ADARNNModule(ScoreModule):
    """A ScoreModule that adds to the loss `dw` times the distances of states between domains.

    A domain is a period of the train segment. The distance between two domains is a sum over layers
    and steps, weighted by the importance of each step. The `num_domains` periods have equal numbers
    of days ("even", as in Qlib), or are composed of ten slots so that their mean features are as
    different as possible ("diverse", the paper's temporal distribution characterization). In the
    first `pre_epoch` epochs gates learn the importance. After that, the importance is the mean over
    the last of these epochs and is boosted: a step whose distance has grown from one epoch to the
    next is multiplied by 1 + sigmoid(growth). Gates, importance and distances are saved in
    checkpoints; prediction needs none of them.

    Differences from Qlib: each random batch has samples of all domains, each sample is used once
    per epoch, and the smaller domain is repeated cyclically (Qlib draws batches by domain, drops
    the last incomplete ones, and stops with the shortest domain). `cosine` compares mean states
    (Qlib compares the means over all elements, so that its loss is 0 or 2 and has no gradient).
    Each pair of domains has its own importance. Distances are averaged over pairs of domains, as in
    the paper, while Qlib sums them (its `dw` of 0.5 corresponds to 0.25 here). Not implemented:
    distances that need a network of their own, which Qlib initializes again at each call, and those
    that take logarithms of states.
    """

    domain: Tensor
    importance: Tensor
    distance: Tensor
    distance_before: Tensor

    single_device_reason: ClassVar[str | None] = (
        "it pairs the samples of a batch across domains and accumulates their distances per batch"
    )

    def __init__(
        self,
        *args: Any,
        dw: float = 0.25,
        loss_type: str = "cosine",
        pre_epoch: int = 40,
        num_domains: int = 2,
        domains: str = "even",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_name("loss_type", loss_type, DISTANCES)
        check_name("domains", domains, SPLITS)
        if not 2 <= num_domains <= NUM_SLOTS:
            raise ConfigError(f"num_domains is {num_domains}; expected 2 to {NUM_SLOTS}.")
        self.dw, self.loss_type, self.pre_epoch = dw, loss_type, pre_epoch
        self.num_domains, self.domains = num_domains, domains
        self.pairs = list(combinations(range(num_domains), 2))

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.require_network(ADARNN)
        if train.num_days < NUM_SLOTS:
            raise ConfigError(
                f"the train segment has {train.num_days} days; ADARNN needs at least {NUM_SLOTS}."
            )
        num_layers, steps = len(network.features), train.num_steps
        self.gates = StepGates(num_layers, steps, network.fc_out.in_features).to(train.device)
        shape = (len(self.pairs), num_layers, steps)
        for name in ("importance", "distance", "distance_before"):
            self.register_buffer(name, torch.zeros(shape, device=train.device))
        self.importance += 1 / steps
        domain = self._assign_domains(train).to(train.device)
        self.register_buffer("domain", domain, persistent=False)

    def _assign_domains(self, train: Samples) -> Tensor:
        """Return the domain of each calendar row, `[D]`; boundaries are between train days."""
        days = torch.unique(train.date).cpu()
        slot = torch.zeros(len(train.calendar), dtype=torch.long)
        slot[days] = torch.arange(len(days)) * NUM_SLOTS // len(days)
        if self.domains == "diverse":
            cuts = _diverse_cuts(*_slot_means(train, slot), self.num_domains)
            return torch.bucketize(slot, torch.tensor(cuts), right=True)
        domain = torch.zeros_like(slot)
        domain[days] = torch.arange(len(days)) * self.num_domains // len(days)
        return domain

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        num_boosts = self.current_epoch - self.pre_epoch
        if num_boosts < 0:
            self.importance.zero_()  # the gates' weights are summed during the epoch
        elif num_boosts > 1:
            growth = self.distance - self.distance_before
            self.importance *= torch.where(growth > EPSILON, 1 + torch.sigmoid(growth), 1.0)
        if num_boosts >= 0:
            self.importance /= self.importance.sum(-1, keepdim=True).clamp(min=EPSILON)
        self.distance_before.copy_(self.distance)
        self.distance.zero_()

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        if batch.is_day:
            raise ConfigError(
                "ADARNN compares periods within a batch and cannot use batches of whole days: set "
                "batch.order=random."
            )
        (x,), _ = self.forward_adapter.arguments(batch)
        with self.effective_network(ADARNN) as network:
            states = network.states(x)
            score = network.score_states(states)
        total, total_weight = self.loss_sums_from_scores(score, batch, complete=self.complete)
        all_states = torch.stack(tuple(states))  # [layers, B, T, H]
        transfer = total.new_zeros(())
        for pair_index, (first, second, has_both) in enumerate(self._pair_samples(batch)):
            source, target = all_states[:, first], all_states[:, second]
            distance = step_distances(self.loss_type, source, target)
            distance = torch.where(has_both, distance, 0.0)  # [layers, T]
            if self.current_epoch < self.pre_epoch:
                weight = self.gates(source.unbind(), target.unbind())
                self.importance[pair_index] += weight.detach()
            else:
                weight = self.importance[pair_index]
            self.distance[pair_index] += distance.detach()
            transfer = transfer + (weight * distance).sum()
        return total + self.dw * total_weight * transfer / len(self.pairs), total_weight

    def _pair_samples(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return, for each pair of domains, the positions `[B]` to compare and whether both occur.

        Samples are paired one by one; a smaller domain is repeated cyclically.
        """
        domain = self.domain[batch.date]
        order = domain.argsort(stable=True)
        sample_index = torch.arange(len(domain), device=domain.device)
        domain_ids = torch.arange(self.num_domains, device=domain.device)
        counts = (domain[:, None] == domain_ids).sum(0)
        starts = counts.cumsum(0) - counts

        def positions(domain_id: int) -> Tensor:
            position = starts[domain_id] + sample_index % counts[domain_id].clamp(min=1)
            return order[position.clamp(max=len(order) - 1)]

        return [
            (positions(a), positions(b), (counts[a] > 0) & (counts[b] > 0)) for a, b in self.pairs
        ]


def _slot_means(train: Samples, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Return each slot's mean features `[NUM_SLOTS, F]` and sample counts `[NUM_SLOTS]`."""
    sums = torch.zeros(NUM_SLOTS, train.num_features, dtype=torch.float64)
    counts = torch.zeros(NUM_SLOTS, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(train), device=train.index_device), CHUNK_SIZE):
        batch = train.batch(rows)
        sample_slot = slot[batch.date.cpu()]
        sums.index_add_(0, sample_slot, batch.x.mean(1).double().cpu())
        counts += torch.bincount(sample_slot, minlength=NUM_SLOTS)
    return sums / counts.clamp(min=1)[:, None], counts


def _diverse_cuts(means: Tensor, counts: Tensor, num_domains: int) -> tuple[int, ...]:
    """Return the boundaries between slots that make the domains' mean features most different."""

    def spread(cuts: tuple[int, ...]) -> float:
        boundaries = [0, *cuts, NUM_SLOTS]
        domain_means = [
            (means[a:b] * counts[a:b, None]).sum(0) / counts[a:b].sum()
            for a, b in pairwise(boundaries)
        ]
        return float(torch.pdist(torch.stack(domain_means)).square().mean())

    return max(combinations(range(1, NUM_SLOTS), num_domains - 1), key=spread)
