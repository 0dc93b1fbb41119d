"""Which of a launcher's processes this one is, by the variables that torchrun and srun set."""

from __future__ import annotations

import pytest

from qtorch.core.launch import external_world, first_node

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


def test_torchrun() -> None:
    world = external_world(TORCHRUN)
    assert world is not None
    assert (world.kind, world.rank, world.size) == ("torchrun", 3, 4)
    assert (world.local_rank, world.num_local) == (1, 2)
    assert (world.address, world.port, world.has_store) == ("gpu01", 29500, True)


def test_srun() -> None:
    world = external_world(SRUN)
    assert world is not None
    assert (world.kind, world.rank, world.size) == ("srun", 2, 4)
    assert (world.local_rank, world.num_local) == (0, 2)
    assert (world.address, world.has_store) == ("gpu03", False)
    other = external_world({**SRUN, "SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.port != world.port
    given = external_world({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5000"})
    assert given is not None
    assert (given.address, given.port) == ("head", 5000)


@pytest.mark.parametrize(
    "gone",
    [
        {"SLURM_STEP_ID": None},  # a batch script knows of its job's tasks too
        {"SLURM_STEP_NUM_TASKS": "1"},  # submitit's job
        dict.fromkeys(SRUN),
    ],
)
def test_nobody_has_started_several(gone: dict[str, str | None]) -> None:
    left = {**SRUN, **gone}
    assert external_world({k: v for k, v in left.items() if v is not None}) is None
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
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
