"""What each rank of a training holds of its own, in a checkpoint and out of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from qtorch.model import own_metrics
from qtorch.model.checkpoint import KEEPER
from qtorch.model.generators import generator_states, restore_generators
from qtorch.model.module import ScoreModule
from qtorch.model.rank_group import RankGroup

log = logging.getLogger(__name__)

GENERATORS, TALLIES, THREADS = "generators", "tallies", "threads"


@dataclass
class RankStates:
    """Generators and loss sums of every rank (of a user's own module what it has logged), and where
    in which training they were taken."""

    generators: list[dict[str, Any]]
    tallies: list[Any]
    place: tuple[int, ...] = ()
    threads: int = 0

    @classmethod
    def of(cls, ranks: RankGroup, module: pl.LightningModule) -> RankStates:
        """Those of this moment. Every rank must ask."""
        if isinstance(module, ScoreModule):
            tally: Any = module.tally.sums().cpu()
        else:
            tally = own_metrics.epoch_state(module)
        states = generator_states(every_device=ranks.size == 1)
        found = ranks.gather((states, tally))
        parts = [g for g, _ in found], [t for _, t in found]
        return cls(*parts, threads=torch.get_num_threads())

    def content(self) -> dict[str, Any]:
        """For a checkpoint."""
        alone = len(self.generators) == 1
        generators = self.generators[0] if alone else self.generators
        return {GENERATORS: generators, TALLIES: self.tallies, THREADS: self.threads}

    @classmethod
    def read(cls, checkpoint: dict[str, Any], seed: int) -> RankStates:
        """From a checkpoint of any number of ranks, of a training with this seed."""
        state = checkpoint[KEEPER]
        place = (seed, int(checkpoint["epoch"]), int(state.get("position", 0)))
        found, threads = state[GENERATORS], state[THREADS]
        alone = not isinstance(found, list)
        return cls([found] if alone else found, state[TALLIES], place, threads)

    def take_up(self, ranks: RankGroup, module: pl.LightningModule) -> None:
        """Go on where they were. Another number of ranks has the same samples of the epoch still
        before it, but other draws: generators are seeded by (seed, epoch, position, size, rank),
        and the sums so far count once; what a user's own module has logged in the epoch, which
        cannot be shared out, counts no more."""
        before = len(self.generators)
        if before == ranks.size:
            self._compare_threads(module.device)
            restore_generators(self.generators[ranks.rank])
            own = self.tallies[ranks.rank]
        else:
            log.warning(
                "the checkpoint is of %d devices, this training goes on with %d: with the samples "
                "of the epoch that are not yet used, but with random draws (dropout) of their own.",
                before,
                ranks.size,
            )
            ranks.seed(*self.place)
            own = torch.stack(self.tallies).sum(0) if isinstance(module, ScoreModule) else None
            if own is not None and not ranks.first:
                own = torch.zeros_like(own)
        if isinstance(module, ScoreModule):
            module.tally.loss, module.tally.weight = own.to(module.device).unbind()
            module.tally.count = 0
        elif own is not None:
            own_metrics.take_up(module, own)

    def _compare_threads(self, device: torch.device) -> None:
        """Say where a CPU adds up in another order than before."""
        now = torch.get_num_threads()
        if device.type == "cpu" and self.threads != now:
            log.warning(
                "the checkpoint is of %d threads, this training goes on with %d: sums may differ "
                "from those of before in their last bits (OMP_NUM_THREADS sets the number).",
                self.threads,
                now,
            )
