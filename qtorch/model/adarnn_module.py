"""Trains ADARNN: the train segment falls into domains of time, whose states are drawn together."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.model.module import ScoreModule
from qtorch.nn.adarnn import ADARNN, DISTANCES, StepGates, step_distances

SLOTS = 10  # of which domains are made
CHUNK = 8192
SPLITS = ("even", "diverse")
EPSILON = 1e-5


class ADARNNModule(ScoreModule):
    """A ScoreModule whose loss is that of the scores and `dw` times the distance of the states of
    each two domains: a sum over layers and steps, weighted by the steps' importance.

    `num_domains` periods of the train segment have the same number of days ("even", as in Qlib),
    or are those of ten slots whose mean features lie farthest apart ("diverse", as the paper
    characterises time). In the first `pre_epoch` epochs gates learn the importance; then it is
    the mean of the last of these epochs and is boosted: a step whose distance has grown from one
    epoch to the next gains by 1 + sigmoid(growth). Gates, importance and distances are part of
    the checkpoints; to predict none is needed.

    Differences from Qlib's: each random batch holds samples of all domains, of each one once an
    epoch, and the lesser domain goes round (Qlib draws batches by domain, drops the tails, and
    stops with the shortest); `cosine` compares mean states (Qlib's the means of all their
    numbers: its loss is 0 or 2 and has no gradient); importance is kept for each two domains; the
    paper's mean over domains and pairs, where Qlib adds them (its `dw` of 0.5 is 0.25 here);
    distances that need a network of their own, which Qlib draws anew at each call, and those that
    take logarithms of states are left out.
    """

    domain: Tensor
    importance: Tensor
    distance: Tensor
    distance_before: Tensor

    undivided: ClassVar[str | None] = (
        "it pairs the samples of a batch across domains, and adds up their distances batch by batch"
    )

    def __init__(
        self,
        *arguments: Any,
        dw: float = 0.25,
        loss_type: str = "cosine",
        pre_epoch: int = 40,
        num_domains: int = 2,
        domains: str = "even",
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        if loss_type not in DISTANCES:
            raise ConfigError(unknown_name("loss_type", loss_type, DISTANCES))
        if domains not in SPLITS:
            raise ConfigError(unknown_name("domains", domains, SPLITS))
        if not 2 <= num_domains <= SLOTS:
            raise ConfigError(f"num_domains is {num_domains}; expected 2 to {SLOTS}.")
        self.dw, self.loss_type, self.pre_epoch = dw, loss_type, pre_epoch
        self.num_domains, self.domains = num_domains, domains
        self.pairs = list(combinations(range(num_domains), 2))

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.trains(ADARNN)
        if train.num_days < SLOTS:
            raise ConfigError(f"{train.num_days} train days; domains of time take {SLOTS}.")
        num_layers, steps = len(network.features), train.num_steps
        self.gates = StepGates(num_layers, steps, network.fc_out.in_features).to(train.device)
        form = (len(self.pairs), num_layers, steps)
        for name in ("importance", "distance", "distance_before"):
            self.register_buffer(name, torch.zeros(form, device=train.device))
        self.importance += 1 / steps
        self.register_buffer("domain", self._domain_of(train).to(train.device), persistent=False)

    def _domain_of(self, train: Samples) -> Tensor:
        """The domain of each calendar row, `[D]`: the cuts lie between train days."""
        days = torch.unique(train.date).cpu()
        slot = torch.full((len(train.calendar),), 0)
        slot[days] = torch.arange(len(days)) * SLOTS // len(days)
        if self.domains == "diverse":
            cuts = _diverse_cuts(*_slot_means(train, slot), self.num_domains)
            return torch.bucketize(slot, torch.tensor(cuts), right=True)
        even = torch.zeros_like(slot)
        even[days] = torch.arange(len(days)) * self.num_domains // len(days)
        return even

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        boosted = self.current_epoch - self.pre_epoch
        if boosted < 0:
            self.importance.zero_()  # the gates' shares are added up
        elif boosted > 1:
            grown = self.distance - self.distance_before
            gain = torch.where(grown > EPSILON, 1 + torch.sigmoid(grown), 1.0)
            self.importance *= gain
        if boosted >= 0:
            self.importance /= self.importance.sum(-1, keepdim=True).clamp(min=EPSILON)
        self.distance_before.copy_(self.distance)
        self.distance.zero_()

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        if batch.is_day:
            raise ConfigError(
                "ADARNN compares periods within a batch, and whole days are of one: batch.order="
                "random."
            )
        (x,), _ = self.feeder.arguments(batch)
        with self.acting(ADARNN) as network:
            states = network.states(x)
            score = network.scored(states)
        total, share = self.sums_of(score, batch, complete=self.complete)
        transfer = total.new_zeros(())
        for number, (first, second, met) in enumerate(self._paired(batch)):
            source, target = [s[first] for s in states], [s[second] for s in states]
            apart = torch.stack(
                [step_distances(self.loss_type, *each) for each in zip(source, target, strict=True)]
            )
            apart = torch.where(met, apart, 0.0)
            if self.current_epoch < self.pre_epoch:
                weight = self.gates(source, target)
                self.importance[number] += weight.detach()
            else:
                weight = self.importance[number]
            self.distance[number] += apart.detach()
            transfer = transfer + (weight * apart).sum()
        return total + self.dw * share * transfer / len(self.pairs), share

    def _paired(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each two domains the places `[B]` of the batch to compare, and whether it has both:
        sample by sample, each domain from its beginning again when it is through."""
        domain = self.domain[batch.date]
        order, turn = domain.argsort(stable=True), torch.arange(len(domain), device=domain.device)
        known = torch.arange(self.num_domains, device=domain.device)
        counts = (domain[:, None] == known).sum(0)
        starts = counts.cumsum(0) - counts

        def places(which: int) -> Tensor:
            at = starts[which] + turn % counts[which].clamp(min=1)
            return order[at.clamp(max=len(order) - 1)]

        return [(places(a), places(b), (counts[a] > 0) & (counts[b] > 0)) for a, b in self.pairs]


def _slot_means(train: Samples, slot: Tensor) -> tuple[Tensor, Tensor]:
    """The mean features `[SLOTS, F]` of each slot's samples, and their numbers `[SLOTS]`."""
    sums = torch.zeros(SLOTS, train.num_features, dtype=torch.float64)
    counts = torch.zeros(SLOTS, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(train), device=train.index_device), CHUNK):
        batch = train.batch(rows)
        own = slot[batch.date.cpu()]
        sums.index_add_(0, own, batch.x.mean(1).double().cpu())
        counts += torch.bincount(own, minlength=SLOTS)
    return sums / counts.clamp(min=1)[:, None], counts


def _diverse_cuts(means: Tensor, counts: Tensor, num_domains: int) -> tuple[int, ...]:
    """Where the slots are cut so that the domains' mean features lie farthest apart."""

    def apart(cuts: tuple[int, ...]) -> float:
        ends = [0, *cuts, SLOTS]
        own = torch.stack(
            [(means[a:b] * counts[a:b, None]).sum(0) / counts[a:b].sum() for a, b in pairwise(ends)]
        )
        return float(torch.pdist(own).square().mean())

    return max(combinations(range(1, SLOTS), num_domains - 1), key=apart)
