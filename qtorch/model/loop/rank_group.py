"""Communication among the ranks of one training: sums, broadcasts, agreement, gathering."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
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


@dataclass(frozen=True)
class RankInfo:
    """Rank `rank` of `size` processes, the `local_rank`th of its node.

    The processes meet at `address`:`port`.
    """

    rank: int
    size: int
    local_rank: int
    node_rank: int
    address: str
    port: int


class RankEnvironment(ClusterEnvironment):
    """A cluster environment with a fixed RankInfo, which ignores variables of other launchers."""

    def __init__(self, rank_info: RankInfo) -> None:
        super().__init__()
        self.rank_info = rank_info

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.rank_info.address

    @property
    def main_port(self) -> int:
        return self.rank_info.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.rank_info.size

    def set_world_size(self, size: int) -> None:
        assert size == self.rank_info.size, "devices x num_nodes is the number of ranks"

    def global_rank(self) -> int:
        return self.rank_info.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.rank_info.rank, "the rank is fixed"

    def local_rank(self) -> int:
        return self.rank_info.local_rank

    def node_rank(self) -> int:
        return self.rank_info.node_rank
