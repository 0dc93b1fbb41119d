"""Which process of torchrun's or srun's this one is; told by the environment alone."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN, SRUN = "torchrun", "srun"
PORTS = (20000, 20000)  # the first, and how many


@dataclass(frozen=True)
class World:
    """Process `rank` of `size` that `kind` has started, the `local_rank`th of its node's
    `num_local`; they meet at `address`:`port`, where `has_store` says that a store is already."""

    kind: str
    rank: int
    size: int
    local_rank: int
    num_local: int
    address: str
    port: int
    has_store: bool = False
    attempt: int = 0  # torchrun starts them all again where one fails


def external_world(environment: Mapping[str, str] | None = None) -> World | None:
    """What torchrun or srun says of this process; None where neither has started several.

    Of srun only a step of several tasks counts: a batch script and a job of one task have the
    same variables beside. MASTER_ADDR and MASTER_PORT stand in for the step's first node and a
    port made of the step's number.
    """
    given = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" in given and int(given.get("WORLD_SIZE", "1")) > 1:
        return World(
            TORCHRUN,
            int(given["RANK"]),
            int(given["WORLD_SIZE"]),
            int(given["LOCAL_RANK"]),
            int(given.get("LOCAL_WORLD_SIZE", given["WORLD_SIZE"])),
            given["MASTER_ADDR"],
            int(given["MASTER_PORT"]),
            given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            int(given.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    size = int(given.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" not in given or size < 2:
        return None
    step = f"{given.get('SLURM_JOB_ID')}.{given['SLURM_STEP_ID']}"
    per_node = given.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    return World(
        SRUN,
        int(given["SLURM_PROCID"]),
        size,
        int(given["SLURM_LOCALID"]),
        int(re.match(r"\d+", per_node)[0]),  # type: ignore[index]  # SLURM writes a number first
        given.get("MASTER_ADDR") or first_node(given.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        int(given.get("MASTER_PORT") or PORTS[0] + zlib.crc32(step.encode()) % PORTS[1]),
    )


def first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu[03-05,9],login" is gpu03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return nodes if found is None else found[1] + (found[2] or "")
