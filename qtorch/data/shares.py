"""Batches that several ranks share: each takes its part, nothing twice, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError
from qtorch.data.batches import Batch, BatchLoader
from qtorch.data.gather import NAN
from qtorch.data.sample_set import Samples

BLANK_ROWS = 2  # a network may want a variance


def share_of(count: int, rank: int, world: int) -> slice:
    """The part of `count` things in a row that a rank of `world` takes: shares differ by one at
    most, the first ranks have the larger ones."""
    base, more = divmod(count, world)
    begin = rank * base + min(rank, more)
    return slice(begin, begin + base + (rank < more))


def balanced_blocks(counts: Tensor, world: int) -> list[int]:
    """`world + 1` bounds that cut days with `counts [G]` samples into blocks of about as many
    samples each; a day lies in one block, a block may be empty."""
    total = int(counts.sum())
    before = counts.cumsum(0) - counts
    middle = (before + counts / 2).double()
    inner = torch.arange(1, world, dtype=torch.float64) * total / world
    return [0, *torch.searchsorted(middle, inner).tolist(), len(counts)]


def blank_batch(samples: Samples, by_day: bool) -> Batch:
    """What a rank works on that has no share of a batch: real features, so that every network
    gives numbers, and no label, so that nothing is learnt or judged."""
    if by_day:
        batch = samples.day_batch(torch.zeros(1, dtype=torch.int64))
    else:
        rows = torch.arange(min(BLANK_ROWS, len(samples)), device=samples.index_device)
        batch = samples.batch(rows)
    for value, filler in ((batch.y, NAN), (batch.extra.get("raw_label"), NAN), (batch.weight, 0.0)):
        if value is not None:
            value.fill_(filler)
    batch.num_samples, batch.blank = 0, True
    return batch


def check_size(order: str, size: int, days_per_batch: int, world: int) -> None:
    """ConfigError for batches too small for each of `world` devices to have a share."""
    by_day = order.startswith("day")
    name, found = ("days_per_batch", days_per_batch) if by_day else ("size", size)
    if found < world:
        never = ", and a day is never split" if by_day else ""
        raise ConfigError(
            f"batch.{name} is {found}, but {world} devices share each batch{never}: set "
            f"batch.{name} to {world} or more, or use fewer devices."
        )


class SharedLoader(BatchLoader):
    """A rank's share of each batch of a BatchLoader: of random batches rows, of day batches days.

    Number, order and content of the whole batches are those of one device, a function of (seed,
    epoch, step). A batch too small for every rank leaves the last ones a `blank_batch`; with
    `trim`, for modules that know nothing of those, it is left out (it can only be the last).
    """

    def __init__(
        self, samples: Samples, *, rank: int, world: int, trim: bool = False, **named: Any
    ) -> None:
        super().__init__(samples, **named)
        check_size(self.order, self.size, self.size, world)
        self.rank, self.world = rank, world
        self.trim = trim

    def __len__(self) -> int:
        whole, rest = divmod(self._count, self.size)
        return whole + int(rest >= self.world if self.trim else rest > 0)

    def _batch(self, order: Tensor, on_device: Tensor, step: int) -> Batch:
        begin, end = step * self.size, min((step + 1) * self.size, self._count)
        part = share_of(end - begin, self.rank, self.world)
        own = slice(begin + part.start, begin + part.stop)
        if part.start == part.stop:
            batch = blank_batch(self.samples, self.by_day)
        elif self.by_day:
            batch = self.samples.day_batch(order[own])
        else:
            batch = self.samples.batch(on_device[own])
        batch.num_whole = end - begin
        return batch


class BlockLoader(BatchLoader):
    """A rank's block of whole days, in order of time, to be judged: every sample in one block.

    `limit` takes the first so many batches of one device alone. All ranks have the same number of
    batches; where a block has too few samples (days) for that, some are a `blank_batch`
    (ConfigError where modules know nothing of those: `blanks` False).
    """

    def __init__(
        self,
        samples: Samples,
        *,
        rank: int,
        world: int,
        limit: int | None = None,
        blanks: bool = True,
        **named: Any,
    ) -> None:
        super().__init__(samples, **named)
        count = self._count if limit is None else min(self._count, limit * self.size)
        per_day = torch.unique_consecutive(samples.date.cpu(), return_counts=True)[1]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), per_day.cumsum(0)])
        if self.by_day:
            # The bounds of one device's batches: there are losses that depend on where one ends.
            bounds = torch.arange(0, count, self.size if blanks else 1)
        else:
            bounds = starts[starts < count]  # a limit may cut the last day
        bounds = torch.cat([bounds, torch.tensor([count])])
        counts = (starts[bounds] if self.by_day else bounds).diff()
        blocks = bounds[balanced_blocks(counts, world)].tolist()
        sizes = [b - a for a, b in pairwise(blocks)]
        self.num_batches: int = -(-max(sizes) // self.size)
        if not blanks and min(sizes) < self.num_batches:
            raise ConfigError(
                f"{samples.num_days} days are too few to be judged by {world} devices: use fewer."
            )
        self.begin, self.end = blocks[rank], blocks[rank + 1]
        self.whole_batches = self.by_day and blanks

    def __len__(self) -> int:
        return self.num_batches

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if not self.num_batches:
            return iter(())
        return super().batches(epoch, start_step)

    def _batch(self, order: Tensor, on_device: Tensor, step: int) -> Batch:
        if self.whole_batches:
            first = min(self.begin + step * self.size, self.end)
            own = slice(first, min(first + self.size, self.end))
        else:
            part = share_of(self.end - self.begin, step, self.num_batches)
            own = slice(self.begin + part.start, self.begin + part.stop)
        if own.start == own.stop:
            return blank_batch(self.samples, self.by_day)
        if self.by_day:
            return self.samples.day_batch(order[own])
        return self.samples.batch(on_device[own])
