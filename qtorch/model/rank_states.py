"""What each rank of a training holds of its own, in a checkpoint and out of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from qtorch.model.checkpoint import KEEPER
from qtorch.model.generators import generator_states, restore_generators
from qtorch.model.module import STATE, ScoreModule
from qtorch.model.rank_group import RankGroup

log = logging.getLogger(__name__)

GENERATORS, TALLIES, THREADS = "generators", "tallies", "threads"


@dataclass
class RankStates:
    """Generators and loss sums of every rank, and where in which training they were taken."""

    generators: list[dict[str, Any]]
    tallies: list[Any]
    place: tuple[int, ...] = ()
    threads: int | None = None

    @classmethod
    def of(cls, ranks: RankGroup, module: pl.LightningModule) -> RankStates:
        """Those of this moment. Every rank must ask."""
        tally = module.tally.sums().cpu() if isinstance(module, ScoreModule) else None
        states = generator_states(every_device=ranks.size == 1)
        found = ranks.gather((states, tally))
        parts = [g for g, _ in found], [t for _, t in found]
        return cls(*parts, threads=torch.get_num_threads())

    def content(self) -> dict[str, Any]:
        """For a checkpoint; of one process the tally is in the module's own part."""
        if len(self.generators) == 1:
            return {GENERATORS: self.generators[0], THREADS: self.threads}
        return {GENERATORS: self.generators, TALLIES: self.tallies, THREADS: self.threads}

    @classmethod
    def read(cls, checkpoint: dict[str, Any], seed: int) -> RankStates:
        """From a checkpoint of any number of ranks, of a training with this seed."""
        state = checkpoint[KEEPER]
        place = (seed, int(checkpoint["epoch"]), int(state.get("position", 0)))
        found, threads = state[GENERATORS], state.get(THREADS)  # not in checkpoints of before
        if not isinstance(found, list):
            return cls([found], [checkpoint.get(STATE, {}).get("sums")], place, threads)
        return cls(found, state[TALLIES], place, threads)

    def take_up(self, ranks: RankGroup, module: pl.LightningModule) -> None:
        """Go on where they were. Another number of ranks has the same samples of the epoch still
        before it, but other draws: generators are seeded by (seed, epoch, position, size, rank),
        and the sums so far count once."""
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
            parts = [t for t in self.tallies if t is not None]
            own = torch.stack(parts).sum(0) if parts else None
            if own is not None and not ranks.first:
                own = torch.zeros_like(own)
        if own is not None and isinstance(module, ScoreModule):
            module.tally.loss, module.tally.weight = own.to(module.device).unbind()
            module.tally.count = 0

    def _compare_threads(self, device: torch.device) -> None:
        """Say where a CPU adds up in another order than before."""
        now = torch.get_num_threads()
        if device.type == "cpu" and self.threads not in (None, now):
            log.warning(
                "the checkpoint is of %d threads, this training goes on with %d: sums may differ "
                "from those of before in their last bits (OMP_NUM_THREADS sets the number).",
                self.threads,
                now,
            )
