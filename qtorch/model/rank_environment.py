"""The position of a rank among the processes of a training, in the form that Lightning asks for."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment


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
