"""Detection of the GPUs of a worker without torch."""

from __future__ import annotations

import pytest

from qtorch.core.errors import ConfigError
from qtorch.task.devices import assign_gpus, device_environment, device_names, jobs_per_gpu
from qtorch.task.worker import Supervisor, WorkerOptions


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """`gpus(3)` simulates a machine whose nvidia-smi lists three GPUs.

    With `parts` the second GPU is divided.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_gpus(count: int, code: int = 0, parts: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        lines = ""
        for k in range(count):
            lines += f"echo 'GPU {k}: NVIDIA H100 (UUID: GPU-5c8{k})'\n"
            for part in range(parts if k == 1 else 0):
                lines += f"echo '  MIG 1g.10gb     Device  {part}: (UUID: MIG-1f{part})'\n"
        tool.write_text(f"#!/bin/sh\n{lines}exit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setenv("PATH", str(tmp_path))
    return set_gpus


def test_automatic_detection_of_devices(gpus, monkeypatch):
    assert device_names() == ["cpu"]
    gpus(3)
    assert device_names() == device_names("auto") == ["0", "1", "2"]
    gpus(3, parts=2)
    assert device_names() == ["0", "MIG-1f0", "MIG-1f1", "2"]
    gpus(3, code=9)
    assert device_names() == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1a")
    assert device_names() == ["4", "GPU-1a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1f0,MIG-GPU-5c8/1/0, GPU-1a,-1,2")
    assert device_names() == ["MIG-1f0", "MIG-GPU-5c8/1/0", "GPU-1a"]
    for no_gpus in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", no_gpus)
        assert device_names() == ["cpu"]


def test_explicit_list_of_devices():
    assert device_names("cpu") == ["cpu"]
    assert device_names("1, 0") == ["1", "0"]
    for invalid in ("", ",", "cpu,0"):
        with pytest.raises(ConfigError, match="expected auto, cpu"):
            device_names(invalid)


def test_environment_of_a_child():
    assert device_environment("3") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert device_environment("cpu") == device_environment("cpu", 4) == {"CUDA_VISIBLE_DEVICES": ""}


def test_children_of_a_shared_gpu_divide_its_memory(monkeypatch):
    monkeypatch.delenv("QTORCH_GPU_SHARE", raising=False)
    shared = {"CUDA_VISIBLE_DEVICES": "MIG-1f0", "QTORCH_GPU_SHARE": "0.25"}
    assert device_environment("MIG-1f0", 4) == shared
    monkeypatch.setenv("QTORCH_GPU_SHARE", "0.5")  # this worker shares the GPU with another one
    assert device_environment("3", 2)["QTORCH_GPU_SHARE"] == "0.25"
    assert device_environment("3") == {"CUDA_VISIBLE_DEVICES": "3"}  # inherited
    slots = Supervisor(WorkerOptions("pool", url="sqlite://"), ["0", "1", "0"]).slots
    shares = [slot.environment.get("QTORCH_GPU_SHARE") for slot in slots]
    assert shares == ["0.25", None, "0.25"]


def test_number_of_jobs_that_share_a_gpu():
    assert [jobs_per_gpu(n, 1, 2) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert jobs_per_gpu(3, 2, 4) == 2
    assert jobs_per_gpu(3, 1, 0) == 1


def test_gpus_are_assigned_to_jobs_round_robin():
    names = ["4", "GPU-1a", "6"]
    assert [assign_gpus(names, 1, k) for k in range(4)] == ["4", "GPU-1a", "6", "4"]
    assert [assign_gpus(names, 2, k) for k in range(3)] == ["4,GPU-1a", "6,4", "GPU-1a,6"]
    assert assign_gpus(names, 0, 5) == ""
    assert assign_gpus([], 0, 5) == ""
    with pytest.raises(ConfigError, match="requests 4 GPUs, but this process sees only 3"):
        assign_gpus(names, 4, 0)
