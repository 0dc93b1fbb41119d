"""Detect from the environment whether torchrun or srun started this process, and its rank."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN, SRUN = "torchrun", "srun"
PORTS = (20000, 20000)  # the first port and the number of ports


@dataclass(frozen=True)
class World:
    """A process's place among the processes that torchrun or srun (`kind`) has started.

    `size` is the world size, `num_local` the number of processes on this node. The processes
    rendezvous at `address`:`port`; with `has_store` a store already listens there.
    """

    kind: str
    rank: int
    size: int
    local_rank: int
    num_local: int
    address: str
    port: int
    has_store: bool = False
    attempt: int = 0  # torchrun restarts all processes if one fails


def external_world(environment: Mapping[str, str] | None = None) -> World | None:
    """Return the world that torchrun or srun describes, or None without several processes.

    For srun only a step of several tasks counts: a batch script and a one-task job have the same
    variables otherwise. MASTER_ADDR and MASTER_PORT override the default rendezvous, which is the
    step's first node and a port derived from the step's id.
    """
    variables = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" in variables and int(variables.get("WORLD_SIZE", "1")) > 1:
        return World(
            TORCHRUN,
            int(variables["RANK"]),
            int(variables["WORLD_SIZE"]),
            int(variables["LOCAL_RANK"]),
            int(variables.get("LOCAL_WORLD_SIZE", variables["WORLD_SIZE"])),
            variables["MASTER_ADDR"],
            int(variables["MASTER_PORT"]),
            variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    size = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" not in variables or size < 2:
        return None
    step = f"{variables.get('SLURM_JOB_ID')}.{variables['SLURM_STEP_ID']}"
    per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    return World(
        SRUN,
        int(variables["SLURM_PROCID"]),
        size,
        int(variables["SLURM_LOCALID"]),
        int(re.match(r"\d+", per_node)[0]),  # type: ignore[index]  # SLURM writes a number first
        variables.get("MASTER_ADDR")
        or first_node(variables.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        int(variables.get("MASTER_PORT") or PORTS[0] + zlib.crc32(step.encode()) % PORTS[1]),
    )


def first_node(nodes: str) -> str:
    """Return the first node of a SLURM node list: "gpu03" for "gpu[03-05,9],login"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")
