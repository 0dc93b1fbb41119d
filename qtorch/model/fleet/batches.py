"""The batches of all members of a fleet: one gather for all members that share their samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.samples import Samples
from qtorch.data.transfer import send_to_device

# Sample numbers of which the tensors of a batch are filled where a day has none.
FILLERS: dict[str, Any] = {"y": torch.nan, "raw_label": torch.nan, "mask": False}


@dataclass(frozen=True)
class MemberBatch:
    """The batches of K members in one step.

    `rows [K]` are the members' rows in the stack, int64 on the device; None: all members, in order.
    `members` are the same numbers on the host. The tensors of `batch` have a member axis in front:
    `x [K, B, T, F]`; with `is_shared` there is none, because all members have the same batch.
    `num_samples` is the number of samples of each member.
    """

    members: Sequence[int]
    rows: Tensor | None
    batch: Batch
    num_samples: Sequence[int]
    is_shared: bool = False


class FleetLoader:
    """One epoch of every member, side by side, each in the order of its own seed and epoch.

    `loaders` has the BatchLoader of each member and `num_batches` how many of its batches make an
    epoch. Members whose loaders have the same `Samples` (the same object) are gathered at once, so
    members of the same samples should follow each other. In a step every member has its next batch;
    at the end of an epoch, members whose batches have different sizes take turns in groups of equal
    size, so that no batch is padded with samples that a serial training would not see.

    With `is_shared` (validation), members of the same samples get the same batch once.
    """

    def __init__(
        self,
        loaders: Sequence[BatchLoader],
        num_batches: Sequence[int],
        *,
        is_shared: bool = False,
    ) -> None:
        self.loaders, self.num_batches = list(loaders), list(num_batches)
        self.is_shared = is_shared and len({id(loader.samples) for loader in loaders}) == 1
        self.device = loaders[0].samples.device if loaders else torch.device("cpu")
        self._groups = [self._group_by_size(step) for step in range(len(self))]

    def __len__(self) -> int:
        """The number of steps of the longest epoch."""
        return max(self.num_batches, default=0)

    def batches(self, epochs: Sequence[int]) -> Iterator[MemberBatch]:
        """Yield the batches of one epoch of each member; `epochs` are their numbers."""
        orders = self._orders(epochs)
        for step in range(len(self)):
            for size, members in self._groups[step].items():
                yield self._gather(members, step, size, orders)

    def _group_by_size(self, step: int) -> dict[tuple[int, int], list[int]]:
        """Return the members that have a batch in a step, by the batch's place in their order."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for member, (loader, count) in enumerate(zip(self.loaders, self.num_batches, strict=True)):
            if step < count:
                places = loader.batch_rows(step)
                groups[places.start, places.stop].append(member)
        return groups

    def _orders(self, epochs: Sequence[int]) -> dict[int, tuple[list[int], Tensor]]:
        """Return for each set of samples its members and their orders `[K, S]`, on its device."""
        if self.is_shared:
            first = self.loaders[0]
            order = self._send_order(first, first.epoch_order(epochs[0])[None])
            return {id(first.samples): (list(range(len(self.loaders))), order)}
        members: dict[int, list[int]] = defaultdict(list)
        for member, loader in enumerate(self.loaders):
            members[id(loader.samples)].append(member)
        return {
            key: (
                part,
                self._send_order(
                    self.loaders[part[0]],
                    torch.stack([self.loaders[m].epoch_order(epochs[m]) for m in part]),
                ),
            )
            for key, part in members.items()
        }

    def _send_order(self, loader: BatchLoader, order: Tensor) -> Tensor:
        # Day batches are put together on the host.
        return order if loader.by_day else send_to_device(order, loader.samples.index_device)

    def _gather(
        self,
        members: list[int],
        step: int,
        places: tuple[int, int],
        orders: dict[int, tuple[list[int], Tensor]],
    ) -> MemberBatch:
        begin, end = places
        is_member = set(members)
        ordered: list[int] = []
        parts: list[Batch] = []
        counts: list[int] = []
        for owners, order in orders.values():
            present = [m for m in owners if m in is_member]
            if not present:
                continue
            ordered += present
            if len(present) < len(owners) and not self.is_shared:
                rows_here = torch.tensor([owners.index(m) for m in present])
                order = order.index_select(0, send_to_device(rows_here, order.device))
            loader = self.loaders[present[0]]
            part, part_counts = _gather_members(loader, order[:, begin:end])
            parts.append(part)
            counts += part_counts * (len(present) if self.is_shared else 1)
        rows = None
        if ordered != list(range(len(self.loaders))):
            rows = send_to_device(torch.tensor(ordered), self.device)
        batch = parts[0] if len(parts) == 1 else _join(parts)
        if self.is_shared:
            batch = batch.map_tensors(lambda t: t[0])
        return MemberBatch(ordered, rows, batch, counts, self.is_shared)


def _gather_members(loader: BatchLoader, order: Tensor) -> tuple[Batch, list[int]]:
    """Gather batches `[K, B, ...]` (day batches `[K, G, N, ...]`) of K members of one sample set.

    `order [K, B]` are samples or days. Returns the number of samples of each member as well.
    """
    samples: Samples = loader.samples
    num_members, size = order.shape
    if loader.by_day:
        batch = samples.day_batch(order.reshape(-1))
        counts = samples.day_sizes(order).sum(1).tolist()
    else:
        batch, counts = samples.batch(order.reshape(-1)), [size] * num_members
    batch = samples.send_to_device(batch)
    shape = num_members, size
    return batch.map_tensors(lambda t: t.reshape(*shape, *t.shape[1:])), counts


def _join(parts: Sequence[Batch]) -> Batch:
    """Join the batches of several sample sets along the member axis."""
    if parts[0].date.dim() == 3:  # [K, G, N]: the days of another panel may be wider
        width = max(part.date.shape[2] for part in parts)
        parts = [_widen(part, width) for part in parts]
    first = parts[0]
    tensors: dict[str, Any] = {"extra": {}}
    for name in ("x", "date", "instrument", "y", "weight", "mask"):
        values = [getattr(part, name) for part in parts]
        tensors[name] = None if values[0] is None else torch.cat(values)
    for name in first.extra:
        tensors["extra"][name] = torch.cat([part.extra[name] for part in parts])
    return Batch(**tensors, num_samples=sum(part.num_samples for part in parts))


def _widen(batch: Batch, width: int) -> Batch:
    """Pad day batches `[K, G, N, ...]` to N = `width`."""
    missing = width - batch.date.shape[2]
    if not missing:
        return batch

    def pad(tensor: Tensor | None, name: str) -> Any:
        if tensor is None:
            return None
        amount = [0, 0] * (tensor.dim() - 3) + [0, missing]
        return F.pad(tensor, amount, value=FILLERS.get(name, 0))

    names = ("x", "date", "instrument", "y", "weight", "mask")
    values = {name: pad(getattr(batch, name), name) for name in names}
    extra = {name: pad(tensor, name) for name, tensor in batch.extra.items()}
    return replace(batch, **values, extra=extra)
