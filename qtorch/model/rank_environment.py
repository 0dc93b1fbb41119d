"""Where a rank stands among the processes of a training, as Lightning asks it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment


@dataclass(frozen=True)
class RankPlace:
    """Rank `rank` of `size`, the `local_rank`th of its node; they meet at `address`:`port`."""

    rank: int
    size: int
    local_rank: int
    node_rank: int
    address: str
    port: int


class RankEnvironment(ClusterEnvironment):
    """A place that is given, whatever the environment's variables say of another launcher's."""

    def __init__(self, place: RankPlace) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.size

    def set_world_size(self, size: int) -> None:
        assert size == self.place.size, "devices x num_nodes is the number of ranks"

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.place.rank, "a rank is told its place once"

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node_rank
