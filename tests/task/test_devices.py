"""Which devices a worker finds without torch."""

from __future__ import annotations

import pytest

from qtorch.core.errors import ConfigError
from qtorch.task.devices import device_environment, device_names, in_turn


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """`gpus(3)`: a machine whose nvidia-smi lists so many."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def machine(count: int, code: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        lines = "".join(f"echo {k}\n" for k in range(count))
        tool.write_text(f"#!/bin/sh\n{lines}exit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setenv("PATH", str(tmp_path))
    return machine


def test_what_is_there(gpus, monkeypatch):
    assert device_names() == ["cpu"]
    gpus(3)
    assert device_names() == device_names("auto") == ["0", "1", "2"]
    gpus(3, code=9)
    assert device_names() == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1a")
    assert device_names() == ["4", "GPU-1a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_names() == ["cpu"]


def test_what_is_asked_for():
    assert device_names("cpu") == ["cpu"]
    assert device_names("1, 0") == ["1", "0"]
    for wrong in ("", ",", "cpu,0"):
        with pytest.raises(ConfigError, match="expected auto, cpu"):
            device_names(wrong)


def test_what_a_child_sees():
    assert device_environment("3") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert device_environment("cpu") == {"CUDA_VISIBLE_DEVICES": ""}


def test_jobs_take_gpus_in_turn():
    names = ["4", "GPU-1a", "6"]
    assert [in_turn(names, 1, k) for k in range(4)] == ["4", "GPU-1a", "6", "4"]
    assert [in_turn(names, 2, k) for k in range(3)] == ["4,GPU-1a", "6,4", "GPU-1a,6"]
    assert in_turn(names, 0, 5) == ""
    assert in_turn([], 0, 5) == ""
    with pytest.raises(ConfigError, match="4 GPUs are asked for each job, but this process sees 3"):
        in_turn(names, 4, 0)
