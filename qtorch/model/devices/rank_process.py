"""A rank on this machine, as its parent process handles it: a child like all others.

`torch.distributed.elastic.multiprocessing` is not used, for two reasons. Its processes import the
caller's main script, which starts again without a main guard (`test_script_without_a_main_guard`).
And it carries no messages while they run, which a training needs for metrics and a common stop
(`test_metrics_and_heartbeats_arrive_once`, `test_ctrl_c_stops_all_ranks_after_the_same_step`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from qtorch.process.child import Child, ExitStatus
from qtorch.process.fork_server import current_environment, fork_server

RANK_MODULE = "qtorch.model.devices.rank_training"

# Variables that another launcher sets for its own processes; ranks must not inherit them.
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE")


class RankHandle(Protocol):
    """A rank, as a child process of this process (`Child`) or of another one."""

    exit_status: ExitStatus | None  # how the rank ended, None while it runs

    def receive(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """Return the new messages of the rank."""

    def stop(self) -> None:
        """Ask the rank to stop after its current step."""

    def kill(self) -> None:
        """Kill the rank and its children immediately."""


def start_rank(
    rank: int,
    local_rank: int,
    size: int,
    *,
    threads: int,
    folder: Path,
    digest: str,
    is_single_node: bool,
) -> Child:
    """Start a rank in a child process, which ends when this process does."""
    return fork_server(RANK_MODULE).start(
        f"{RANK_MODULE}.serve_rank",
        {"folder": str(folder), "digest": digest, "rank": rank, "local_rank": local_rank},
        environment=build_rank_variables(
            rank, local_rank, size, threads=threads, is_single_node=is_single_node
        ),
        is_interruptible=False,
        orphan_seconds=0.0,
    )


def build_rank_variables(
    rank: int, local_rank: int, size: int, *, threads: int, is_single_node: bool
) -> dict[str, str]:
    """Return the environment variables of a rank."""
    parent_variables = {
        k: v for k, v in current_environment().items() if not k.startswith(LAUNCHER_PREFIXES)
    }
    rank_variables = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": size,
        "OMP_NUM_THREADS": threads,
    }
    variables = {**parent_variables, **{k: str(v) for k, v in rank_variables.items()}}
    variables["MPLBACKEND"] = "Agg"  # a notebook's backend cannot be imported here
    if is_single_node and sys.platform == "linux":
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve
    return variables


def rank_threads(num_local: int, *, is_launched: bool = False) -> int:
    """Return the threads of each rank on this machine: an equal part, at least one.

    `is_launched`: torchrun or srun has started a process for each rank, and this is one of them.
    """
    # torchrun sets OMP_NUM_THREADS for each of its processes, as a batch script may do: then the
    # threads of this process are a rank's part already. Otherwise a process that srun has started
    # has one thread for each CPU of its job. If srun binds each process to its own CPUs, this
    # divides once too often, and OMP_NUM_THREADS should be set.
    is_divided = is_launched and "OMP_NUM_THREADS" in os.environ
    return max(1, torch.get_num_threads() // (1 if is_divided else num_local))
