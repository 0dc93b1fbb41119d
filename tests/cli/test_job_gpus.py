"""The GPUs of jobs that run in processes of joblib."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from qtorch.cli.jobs import gpus

OTHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    monkeypatch.setenv(gpus.PROCESS_VARIABLE, "0")
    monkeypatch.delenv(gpus.PROCESS_VARIABLE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a")
    monkeypatch.delenv("QTORCH_GPU_SHARE", raising=False)


def environment(number: int, launcher: str = gpus.JOBLIB, n_jobs: int = 2, **trainer: Any):
    hydra = SimpleNamespace(
        launcher=SimpleNamespace(_target_=launcher, n_jobs=n_jobs),
        job=SimpleNamespace(num=number),
    )
    return gpus.job_gpu_environment(OmegaConf.create({"trainer": trainer}), hydra)


def test_a_process_takes_the_gpu_of_its_first_job_and_keeps_it():
    assert environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-1a"}
    assert environment(2) == {"CUDA_VISIBLE_DEVICES": "GPU-1a"}


def test_processes_that_share_a_gpu_divide_its_memory():
    expected = {"CUDA_VISIBLE_DEVICES": "5", "QTORCH_GPU_SHARE": "0.5"}
    assert environment(2, n_jobs=4) == expected


@pytest.mark.parametrize("devices", [[1], -1, "0,1", 3, True])
def test_jobs_that_name_their_devices_keep_all_gpus(devices):
    assert environment(0, devices=devices) == {}


def test_others_keep_all_gpus(monkeypatch):
    assert environment(0, launcher=OTHER) == {}
    assert environment(0, accelerator="cpu") == {}
    assert environment(0, devices=2) == {
        "CUDA_VISIBLE_DEVICES": "5,GPU-1a",
        "QTORCH_GPU_SHARE": "0.5",
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment(0) == {}
