"""The state of each rank of a training, saved to and restored from checkpoints."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from qtorch.model import own_metrics
from qtorch.model.checkpoint import CALLBACK_STATE_KEY
from qtorch.model.generators import get_generator_states, restore_generators
from qtorch.model.module import ScoreModule
from qtorch.model.rank_group import RankGroup

log = logging.getLogger(__name__)

GENERATORS, ACCUMULATORS, THREADS = "generators", "tallies", "threads"


@dataclass
class RankStates:
    """Random generators and loss sums of every rank, with their position in the training.

    For a user's module `accumulators` holds, instead of loss sums, what it has logged in the
    running epoch. `seed_parts` is (seed, epoch, position).
    """

    generators: list[dict[str, Any]]
    accumulators: list[Any]
    seed_parts: tuple[int, ...] = ()
    threads: int = 0

    @classmethod
    def collect(cls, ranks: RankGroup, module: pl.LightningModule) -> RankStates:
        """Collect the current states. Must be called by every rank."""
        if isinstance(module, ScoreModule):
            accumulator: Any = module.accumulator.sums().cpu()
        else:
            accumulator = own_metrics.epoch_state(module)
        states = get_generator_states(every_device=ranks.size == 1)
        rank_states = ranks.gather((states, accumulator))
        parts = [g for g, _ in rank_states], [t for _, t in rank_states]
        return cls(*parts, threads=torch.get_num_threads())

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        is_single_rank = len(self.generators) == 1
        generators = self.generators[0] if is_single_rank else self.generators
        return {GENERATORS: generators, ACCUMULATORS: self.accumulators, THREADS: self.threads}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], seed: int) -> RankStates:
        """Read a checkpoint of any number of ranks; `seed` is the training's seed."""
        state = checkpoint[CALLBACK_STATE_KEY]
        seed_parts = (seed, int(checkpoint["epoch"]), int(state.get("position", 0)))
        generators, threads = state[GENERATORS], state[THREADS]
        is_single_rank = not isinstance(generators, list)
        return cls(
            [generators] if is_single_rank else generators, state[ACCUMULATORS], seed_parts, threads
        )

    def restore(self, ranks: RankGroup, module: pl.LightningModule) -> None:
        """Restore the state of this rank.

        If the number of ranks has changed, the epoch goes on with the samples that were not used
        yet, but with other random draws: generators are seeded by (seed, epoch, position, size,
        rank). The loss sums so far are counted once. What a user's module has logged in the epoch
        so far cannot be split and is dropped.
        """
        num_saved_ranks = len(self.generators)
        if num_saved_ranks == ranks.size:
            self._warn_thread_change(module.device)
            restore_generators(self.generators[ranks.rank])
            state = self.accumulators[ranks.rank]
        else:
            log.warning(
                "the checkpoint was written with %d devices, this training resumes with %d: the "
                "epoch continues with its unused samples, but random draws (dropout) differ.",
                num_saved_ranks,
                ranks.size,
            )
            ranks.seed(*self.seed_parts)
            state = (
                torch.stack(self.accumulators).sum(0) if isinstance(module, ScoreModule) else None
            )
            if state is not None and not ranks.is_first:
                state = torch.zeros_like(state)
        if isinstance(module, ScoreModule):
            module.accumulator.loss, module.accumulator.weight = state.to(module.device).unbind()
            module.accumulator.count = 0
        elif state is not None:
            own_metrics.restore_epoch_state(module, state)

    def _warn_thread_change(self, device: torch.device) -> None:
        """Warn if the number of CPU threads differs, which changes the order of float sums."""
        num_threads = torch.get_num_threads()
        if device.type == "cpu" and self.threads != num_threads:
            log.warning(
                "the checkpoint was written with %d threads, this training resumes with %d: "
                "results may differ in the last bits (set OMP_NUM_THREADS to use the same number).",
                self.threads,
                num_threads,
            )
