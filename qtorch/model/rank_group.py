"""The ranks of one training among each other: sums, agreement, what each of them holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtorch.core.runtime import seed_everything


class RankGroup:
    """This process's place among `size` ranks; alone, everything is as it was given.

    Sums are of tensors on the training's device and wait for nothing. Agreement goes by a group
    of the CPUs beside, so that no question waits for a device.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._control: Any = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and tells."""
        return self.rank == 0

    def connect(self) -> None:
        """Once torch's processes are connected, by every rank."""
        if self.size > 1 and self._control is None:
            # The default group goes by the devices' own way, which objects would have to take.
            self._control = dist.new_group(backend="gloo")

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, everywhere the same; new memory."""
        if self.size == 1:
            return values
        found = values.detach().clone()
        dist.all_reduce(found)
        return found

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes, in place, what the first rank has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def agree(self, wish: bool) -> bool:
        """Whether any rank wishes it: one answer for all."""
        if self.size == 1:
            return wish
        asked = torch.tensor([int(wish)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._control)
        return bool(asked)

    def gather(self, mine: Any) -> list[Any]:
        """What each rank holds, at every rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._control)
        return found

    def seed(self, seed: int, *parts: object) -> None:
        """Seed this rank's generators by (seed, what `parts` say, size, rank)."""
        text = f"qtorch rank {seed} {parts} {self.rank} of {self.size}"
        seed_everything(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little"))
