"""Which devices a training uses, and the settings of torch that decide about its last bits."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from toy_training import ToyDataset, fit_model, make_model

from qtorch.core.errors import ConfigError
from qtorch.model.devices.launcher import WORLD_VARIABLE
from qtorch.model.devices.numerics import CUBLAS_VARIABLE, numerical_settings
from qtorch.model.devices.rank_training import place_rank
from qtorch.model.devices.ranks import check_visible_gpus
from qtorch.model.loop.checkpoint import get_generator_states, restore_generators
from qtorch.model.loop.options import trainer_options

CUDA = torch.device("cuda", 0)


@pytest.fixture
def visible_gpus(monkeypatch):
    """`visible_gpus(n)` lets torch see n GPUs; returns the device that was selected last."""
    selected = SimpleNamespace(device=None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: setattr(selected, "device", device)
    )

    def set_visible(count: int) -> SimpleNamespace:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return selected

    return set_visible


def rank_request(devices, num_local: int, size: int):
    options = trainer_options({"accelerator": "gpu", "devices": devices}, ())
    recipe = SimpleNamespace(trainer=options)
    return SimpleNamespace(recipe=recipe, size=size, num_local=num_local, address="a", port=1)


def test_each_rank_has_a_gpu_of_its_own(visible_gpus):
    selected = visible_gpus(4)
    device, place, options = place_rank(rank_request(2, 2, 4), 3, 1)
    assert (str(device), selected.device) == ("cuda:1", device)
    assert (place.rank, place.local_rank, place.node_rank) == (3, 1, 1)
    assert options.num_devices == 2
    assert str(place_rank(rank_request([3, 1], 2, 2), 0, 0)[0]) == "cuda:3"
    with pytest.raises(ConfigError, match="rank 1 trains on GPU 5 of its node, but sees 4 GPUs"):
        place_rank(rank_request([0, 5], 2, 2), 1, 1)


def test_a_rank_that_sees_one_gpu_uses_it(visible_gpus):
    visible_gpus(1)  # srun --gpus-per-task=1
    device, place, options = place_rank(rank_request(2, 2, 4), 3, 1)
    assert str(device) == "cuda:0"
    assert (place.rank, place.size, place.local_rank, place.node_rank) == (3, 4, 0, 3)
    assert options.num_local == 1
    assert options.num_devices == 4


def test_ranks_are_not_started_without_gpus_for_them(visible_gpus, monkeypatch):
    options = trainer_options({"accelerator": "gpu", "devices": 4}, ())
    visible_gpus(4)
    check_visible_gpus(options)
    visible_gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a,MIG-2b")
    with pytest.raises(ConfigError, match="shows one part of divided GPUs"):
        check_visible_gpus(options)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a,GPU-2b")
    with pytest.raises(ConfigError, match=r"sees 2 GPUs [(]CUDA_VISIBLE_DEVICES=GPU-1a,GPU-2b[)]"):
        check_visible_gpus(options)
    with pytest.raises(ConfigError, match=r"devices is \[0, 3\], but this process sees 2"):
        check_visible_gpus(trainer_options({"accelerator": "gpu", "devices": [0, 3]}, ()))
    check_visible_gpus(trainer_options({"accelerator": "cpu", "devices": 4}, ()))
    monkeypatch.setenv(WORLD_VARIABLE, "{}")  # torchrun or srun gives each rank its GPU
    check_visible_gpus(options)


@pytest.mark.parametrize("accelerator", ["mps", "tpu", "cdua"])
def test_unknown_accelerators_are_refused(accelerator):
    with pytest.raises(ConfigError, match=accelerator):
        make_model(trainer={"accelerator": accelerator})


def test_numerical_settings_hold_within_the_block_only(monkeypatch):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    options = trainer_options({"deterministic": True}, ())
    with numerical_settings(options, "medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop(CUBLAS_VARIABLE) == ":4096:8"
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    with numerical_settings(options, "highest"):
        assert not torch.backends.cudnn.allow_tf32
    monkeypatch.delenv(CUBLAS_VARIABLE)


def test_numerical_settings_are_options_that_a_fit_records(dataset: ToyDataset, monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:8")  # Lightning sets it for good
    with pytest.raises(ConfigError, match="Did you mean 'high'"):
        make_model(matmul_precision="hihg")
    model = fit_model(dataset, epochs=1, matmul_precision="high", trainer={"deterministic": True})
    report = model.fit_report_
    assert (report["matmul_precision"], report["deterministic"]) == ("high", True)
    assert not torch.are_deterministic_algorithms_enabled()
    report = fit_model(dataset, epochs=1).fit_report_
    assert (report["matmul_precision"], report["deterministic"]) == ("highest", False)


def test_random_generators_of_another_number_of_gpus(monkeypatch, caplog):
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7]))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: restored.update({str(device): state})
    )
    states = get_generator_states(CUDA)
    assert [s.tolist() for s in states["cuda"]] == [[7]]
    restore_generators(states, torch.device("cuda", 3))  # the same GPU under another number
    assert restored.pop("cuda:3").tolist() == [7]
    # Checkpoints of earlier versions hold the states of every GPU that was visible.
    eight = {**states, "cuda": [torch.tensor([k]) for k in range(8)]}
    restore_generators(eight, torch.device("cuda", 2))
    assert restored.pop("cuda:2").tolist() == [2]
    with caplog.at_level(logging.WARNING, "qtorch"):
        restore_generators({**states, "cuda": []}, CUDA)
    assert not restored
    assert "random generators of 0 GPUs, not that of cuda:0" in caplog.text
