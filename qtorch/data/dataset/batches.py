"""Batches of samples, in an order that depends only on (seed, epoch, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.samples import Samples, SampleTable, TableRows
from qtorch.data.transfer import CopyStream, send_to_device

Order = Literal["random", "sequential", "day", "day_sequential"]
ORDERS: tuple[str, ...] = get_args(Order)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a CPU generator that depends only on (seed, epoch)."""
    digest = hashlib.sha256(f"qtorch order {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class EpochSampler:
    """A minimal sampler with `set_epoch`, which Lightning looks for on a data loader."""

    def __init__(self, num_samples: int) -> None:
        self.epoch = 0
        self._num_samples = num_samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_samples


class SampleOrder:
    """The samples of an epoch in their order.

    Dates, instruments and labels of the next batches are gathered at once, which takes less time
    than to do it for each batch.
    """

    NUM_ROWS_AHEAD = 1 << 15

    def __init__(self, samples: Samples, order: Tensor) -> None:
        self._samples = samples
        self._order = send_to_device(order, samples.index_device)
        self._table: SampleTable | None = None
        self._rows, self._columns = slice(0, 0), TableRows((), ())  # places, and what they hold

    def batch(self, rows: slice, *, size: int | None = None) -> Batch:
        """Gather the samples at the places `rows` of the order; `size` as of `Samples.batch`."""
        table = self._samples.get_table()
        is_ahead = self._rows.start <= rows.start and rows.stop <= self._rows.stop
        if table is not self._table or not is_ahead:
            end = max(rows.stop, rows.start + self.NUM_ROWS_AHEAD)
            self._table, self._rows = table, slice(rows.start, min(end, len(self._order)))
            self._columns = table.rows(self._order[self._rows])
        begin = self._rows.start
        columns = self._columns.part(rows.start - begin, rows.stop - begin)
        return self._samples.batch(self._order[rows], size=size, columns=columns)


class BatchLoader:
    """Iterate over Samples in batches; one iteration is one epoch with every sample exactly once.

    `order`: "random" shuffles samples, "sequential" follows (datetime, instrument), "day" yields
    `days_per_batch` whole days `[G, N, ...]` per batch in shuffled order, "day_sequential" the
    same in chronological order. The order depends only on (seed, epoch), not on a global random
    generator or on the device. The last batch may be smaller. With `pad_tail` it is padded and
    every batch has a mask, so that all batches have the same shape (for torch.compile). With
    `min_tail`, a last batch of fewer samples shares the samples of the last two batches equally (a
    batch norm cannot train on a single sample).

    `state_dict` and `load_state_dict` hold (epoch, step): a loader that is resumed in mid-epoch
    yields exactly the batches that were left. After its last batch, the epoch starts anew.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int = 800,
        order: Order = "random",
        seed: int = 0,
        days_per_batch: int = 1,
        pad_tail: bool = False,
        min_tail: int = 1,
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(unknown_name_message("order", order, ORDERS))
        for name, value in (("batch_size", batch_size), ("days_per_batch", days_per_batch)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self.samples = samples
        self.order: str = order
        self.seed = seed
        self.pad_tail, self.min_tail = pad_tail, min_tail
        self.by_day = order.startswith("day")
        self.size = days_per_batch if self.by_day else batch_size
        self.sampler = EpochSampler(len(samples))
        self._step = 0
        self._resume: tuple[int, int] | None = None

    # -- order ---------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.samples.num_days if self.by_day else len(self.samples)

    def __len__(self) -> int:
        return -(-self._count // self.size)

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the epoch's permutation of the samples (or days, for day batches), on the CPU."""
        if self.order in ("sequential", "day_sequential"):
            return torch.arange(self._count)
        return torch.randperm(self._count, generator=epoch_generator(self.seed, epoch))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self.sampler.set_epoch(epoch)

    # -- iteration -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.sampler.epoch, 0
        if self._resume is not None:
            if self._resume[0] == epoch and self._resume[1] < len(self):
                start = self._resume[1]
            self._resume = None
        self._step = start
        for step, batch in enumerate(self.batches(epoch, start), start):
            # Set before the yield: Lightning does not run a sized iterable to exhaustion, and a
            # state that is saved during this batch must resume with the next one.
            self._step = step + 1
            yield batch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's batches from `start_step` on; the loader's state is unchanged."""
        order = self.epoch_order(epoch)
        sample_order = None if self.by_day else SampleOrder(self.samples, order)
        steps = range(start_step, len(self))
        batches = (self._batch(order, sample_order, step) for step in steps)
        if self.samples.store != "host":
            yield from batches
        elif self.samples.device.type == "cuda":
            yield from _prefetch(batches, self.samples.device)
        else:
            yield from _one_ahead(map(self.samples.send_to_device, batches))

    def _batch(self, order: Tensor, sample_order: SampleOrder | None, step: int) -> Batch:
        rows = self.batch_rows(step)
        return self._gather(order, sample_order, rows, self.size if self.pad_tail else None)

    def batch_rows(self, step: int) -> slice:
        """Return the places of a batch in the epoch's order."""
        count = self._count
        begin, end = step * self.size, min((step + 1) * self.size, count)
        last = -(-count // self.size) - 1
        if not self.by_day and last > 0 and count - last * self.size < self.min_tail:
            middle = ((last - 1) * self.size + count + 1) // 2
            if step == last:
                begin = middle
            elif step == last - 1:
                end = middle
        return slice(begin, end)

    def _gather(
        self, order: Tensor, sample_order: SampleOrder | None, rows: slice, pad: int | None = None
    ) -> Batch:
        """Gather the samples (or days) at the places `rows` of the order; a dummy for no rows.

        `pad`: pad the batch to this number of samples (or days).
        """
        if rows.start == rows.stop:
            return dummy_batch(self.samples, self.by_day)
        if sample_order is None:
            return self.samples.day_batch(order[rows], num_days=pad)
        return sample_order.batch(rows, size=pad)

    # -- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Return the running epoch and its next step."""
        return {"epoch": self.sampler.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved state: the next iteration of that epoch starts at its step."""
        self._resume = (int(state["epoch"]), int(state["step"]))
        self._step = int(state["step"])
        self.sampler.set_epoch(int(state["epoch"]))


# -- batches of features in host memory ------------------------------------------------------------

T = TypeVar("T")


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one has been made."""
    item = next(items, None)
    while item is not None:
        next_item = next(items, None)
        yield item
        item = next_item


def _prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to the GPU on a stream of its own, while the caller works on the one before.

    Two batches are on the device at a time. The caller's stream waits for a copy when it is yielded
    its batch, not the host.
    """
    stream = CopyStream(device)
    pairs = ((batch, stream.send(batch.tensors())) for batch in batches)
    for batch, copies in _one_ahead(pairs):
        yield batch.with_tensors(copies.receive())


# -- the batches of one of several ranks -----------------------------------------------------------

DUMMY_ROWS = 2  # at least two, as a network may compute a variance


def shard_slice(count: int, rank: int, world_size: int) -> slice:
    """Return the slice of `count` items that a rank takes.

    The sizes of the shares differ by at most one; the first ranks have the larger ones.
    """
    base, remainder = divmod(count, world_size)
    begin = rank * base + min(rank, remainder)
    return slice(begin, begin + base + (rank < remainder))


def balance_blocks(counts: Tensor, world_size: int) -> list[int]:
    """Split days with `counts [G]` samples into one block per rank, of about equal size.

    Returns `world_size + 1` bounds. A day belongs to the block in which its middle sample falls; a
    block may be empty.
    """
    total = int(counts.sum())
    before = counts.cumsum(0) - counts
    middle = (before + counts / 2).double()
    inner = torch.arange(1, world_size, dtype=torch.float64) * total / world_size
    return [0, *torch.searchsorted(middle, inner).tolist(), len(counts)]


def dummy_batch(samples: Samples, by_day: bool) -> Batch:
    """Build the batch for a rank that has no share of a step.

    It has real features, so that every network yields numbers, but no labels, so that it adds
    nothing to the loss or the metrics.
    """
    if by_day:
        batch = samples.day_batch(torch.zeros(1, dtype=torch.int64))
    else:
        rows = torch.arange(min(DUMMY_ROWS, len(samples)), device=samples.index_device)
        batch = samples.batch(rows)
    for value, filler in (
        (batch.y, torch.nan),
        (batch.extra.get("raw_label"), torch.nan),
        (batch.weight, 0.0),
    ):
        if value is not None:
            value.fill_(filler)
    batch.num_samples, batch.is_dummy = 0, True
    return batch


def check_size(order: str, size: int, days_per_batch: int, world_size: int) -> None:
    """Raise ConfigError for batches too small to give each of `world_size` devices a share."""
    by_day = order.startswith("day")
    name, value = ("days_per_batch", days_per_batch) if by_day else ("size", size)
    if value < world_size:
        reason = ", and a day is never split" if by_day else ""
        raise ConfigError(
            f"batch.{name} is {value}, but {world_size} devices share each batch{reason}. Set "
            f"batch.{name} to {world_size} or more, or use fewer devices."
        )


class ShardedLoader(BatchLoader):
    """A rank's share of each batch: rows of random batches, days of day batches.

    Number, order and content of the global batches are those of one device, a function of (seed,
    epoch, step). If a batch is too small for every rank, the last ranks get a `dummy_batch`. With
    `trim`, for modules that do not handle dummy batches, such a batch is left out (it can only be
    the last). `pad_tail` has no effect.
    """

    def __init__(
        self, samples: Samples, *, rank: int, world_size: int, trim: bool = False, **options: Any
    ) -> None:
        super().__init__(samples, **options)
        check_size(self.order, self.size, self.size, world_size)
        self.rank, self.world_size = rank, world_size
        self.trim = trim

    def __len__(self) -> int:
        num_full, remainder = divmod(self._count, self.size)
        return num_full + int(remainder >= self.world_size if self.trim else remainder > 0)

    def _batch(self, order: Tensor, sample_order: SampleOrder | None, step: int) -> Batch:
        batch_rows = self.batch_rows(step)
        begin, end = batch_rows.start, batch_rows.stop
        part = shard_slice(end - begin, self.rank, self.world_size)
        rows = slice(begin + part.start, begin + part.stop)
        batch = self._gather(order, sample_order, rows)
        batch.global_size = end - begin
        return batch


class BlockLoader(BatchLoader):
    """A rank's block of whole days, in chronological order, for evaluation.

    Every sample belongs to one block. `limit` keeps only the first batches, as counted on one
    device. All ranks have the same number of batches; if a block has too few samples (days) for
    that, some of its batches are a `dummy_batch` (ConfigError if `allow_dummies` is False, for
    modules that do not handle them). `pad_tail` has no effect.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        rank: int,
        world_size: int,
        limit: int | None = None,
        allow_dummies: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(samples, **options)
        count = self._count if limit is None else min(self._count, limit * self.size)
        blocks = self._block_bounds(count, world_size, self.size if allow_dummies else 1)
        sizes = [b - a for a, b in pairwise(blocks)]
        self.num_batches: int = -(-max(sizes) // self.size)
        if not allow_dummies and min(sizes) < self.num_batches:
            raise ConfigError(
                f"{samples.num_days} days are too few to evaluate on {world_size} devices; use "
                "fewer devices."
            )
        self.begin, self.end = blocks[rank], blocks[rank + 1]
        self.keeps_batch_bounds = self.by_day and allow_dummies

    def _block_bounds(self, count: int, world_size: int, days_per_cut: int) -> list[int]:
        """Divide the first `count` samples (or days) into one block per rank, between days.

        Blocks of day batches are cut between batches of `days_per_cut` days.
        """
        num_samples = torch.unique_consecutive(self.samples.date.cpu(), return_counts=True)[1]
        day_starts = torch.cat([torch.zeros(1, dtype=torch.int64), num_samples.cumsum(0)])
        if self.by_day:
            # With the batches of one device uncut, because some losses depend on their bounds.
            cuts = torch.arange(0, count, days_per_cut)
        else:
            cuts = day_starts[day_starts < count]  # a limit may cut the last day
        cuts = torch.cat([cuts, torch.tensor([count])])
        samples_between = (day_starts[cuts] if self.by_day else cuts).diff()
        bounds: list[int] = cuts[balance_blocks(samples_between, world_size)].tolist()
        return bounds

    def __len__(self) -> int:
        return self.num_batches

    def _batch(self, order: Tensor, sample_order: SampleOrder | None, step: int) -> Batch:
        if self.keeps_batch_bounds:
            first = min(self.begin + step * self.size, self.end)
            rows = slice(first, min(first + self.size, self.end))
        else:
            part = shard_slice(self.end - self.begin, step, self.num_batches)
            rows = slice(self.begin + part.start, self.begin + part.stop)
        return self._gather(order, sample_order, rows)
