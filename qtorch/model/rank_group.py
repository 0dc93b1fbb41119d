"""Communication among the ranks of one training: sums, broadcasts, agreement, gathering."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtorch.core.runtime import seed_everything


class RankGroup:
    """This process's position among `size` ranks; with one rank every operation returns its input.

    `sum` and `broadcast` act on tensors on the training's device and do not wait for it. `any_rank`
    and `gather` use a second process group on the CPU, so that they do not wait for a device
    either.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and sends messages."""
        return self.rank == 0

    def connect(self) -> None:
        """Create the CPU process group; every rank calls it once torch.distributed is set up."""
        if self.size > 1 and self._control is None:
            # The default group communicates between devices, objects would have to be moved there.
            self._control = dist.new_group(backend="gloo")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, in new memory."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor in place with the first rank's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def any_rank(self, flag: bool) -> bool:
        """Return, on every rank, whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def seed(self, seed: int, *parts: object) -> None:
        """Seed this rank's random generators from (seed, parts, size, rank)."""
        text = f"qtorch rank {seed} {parts} {self.rank} of {self.size}"
        seed_everything(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))
