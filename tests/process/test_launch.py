"""Detection of the world that torchrun or srun describes in the environment."""

from __future__ import annotations

import pytest

from qtorch.process.launch import external_world, first_node

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04],login",
}


def test_world_of_torchrun() -> None:
    world = external_world(TORCHRUN)
    assert world is not None
    assert (world.kind, world.rank, world.size) == ("torchrun", 3, 4)
    assert (world.local_rank, world.num_local) == (1, 2)
    assert (world.address, world.port, world.has_store) == ("gpu01", 29500, True)


def test_world_of_srun() -> None:
    world = external_world(SRUN)
    assert world is not None
    assert (world.kind, world.rank, world.size) == ("srun", 2, 4)
    assert (world.local_rank, world.num_local) == (0, 2)
    assert (world.address, world.has_store) == ("gpu03", False)
    other_step = external_world({**SRUN, "SLURM_STEP_ID": "1"})
    assert other_step is not None
    assert other_step.port != world.port
    override = external_world({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5000"})
    assert override is not None
    assert (override.address, override.port) == ("head", 5000)


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None},  # a batch script has the job's other variables too
        {"SLURM_STEP_NUM_TASKS": "1"},  # a job of submitit
        dict.fromkeys(SRUN),
    ],
)
def test_single_process_has_no_world(changes: dict[str, str | None]) -> None:
    environment = {**SRUN, **changes}
    assert external_world({k: v for k, v in environment.items() if v is not None}) is None
    assert external_world({**TORCHRUN, "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("gpu[03-05,9],login", "gpu03"),
        ("a1,a2", "a1"),
        ("n[7]", "n7"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_node_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
