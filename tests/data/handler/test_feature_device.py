"""The device that computes a handler's features."""

from __future__ import annotations

import pytest
import torch

from qtorch.core.errors import ConfigError
from qtorch.core.runtime import gpu_share
from qtorch.data import Alpha158, DataHandlerLP, SyntheticSource
from qtorch.data.device_memory import free_bytes
from qtorch.data.handler.feature_cache import FeatureCache
from qtorch.data.handler.feature_device import current_feature_device, use_feature_device

DATES = {"start_time": "2020-01-02", "end_time": "2020-06-30"}


def small_source() -> SyntheticSource:
    return SyntheticSource(
        num_instruments=12, start_time="2019-06-03", end_time="2020-07-31", seed=3
    )


def feature_values(**options) -> torch.Tensor:
    handler = Alpha158(**DATES, source=small_source(), columns=["MA5", "CORR10", "KLEN"], **options)
    view = handler.view(DataHandlerLP.DK_R)
    return torch.stack([view.group("feature").column(n) for n in ("MA5", "CORR10", "KLEN")])


def test_unknown_devices_are_refused_when_the_handler_is_built():
    for device in ("gpu", "cuda:x", "mps", 0):
        with pytest.raises(ConfigError, match="expected auto"):
            Alpha158(**DATES, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_without_a_gpu_says_that_the_cpu_computes(caplog):
    caplog.set_level("INFO", "qtorch")
    automatic = feature_values(device="auto")
    lines = [r.message for r in caplog.records if "handler.device=auto" in r.message]
    assert lines == [
        "handler.device=auto: there is no CUDA device, so the CPU computes the features"
    ]
    assert torch.equal(automatic.nan_to_num(), feature_values().nan_to_num())
    with pytest.raises(ConfigError, match="this machine has 0 CUDA devices"):
        feature_values(device="cuda")


def test_device_is_that_of_the_block():
    assert current_feature_device().type == "cpu"
    with use_feature_device("cpu"):
        assert current_feature_device().type == "cpu"


def test_features_of_a_gpu_have_their_own_cache_entry(tmp_path, monkeypatch):
    feature_values(cache=tmp_path)
    key = FeatureCache(tmp_path).keys()
    monkeypatch.setattr(
        "qtorch.data.handler.feature_cache.current_feature_device", lambda: torch.device("cuda", 1)
    )
    feature_values(cache=tmp_path)
    assert len(FeatureCache(tmp_path).keys()) == 2
    monkeypatch.undo()
    feature_values(cache=tmp_path, device="auto" if not torch.cuda.is_available() else "cpu")
    assert set(key) < set(FeatureCache(tmp_path).keys())
    assert len(FeatureCache(tmp_path).keys()) == 2


def test_processes_that_share_a_gpu_divide_its_memory(monkeypatch):
    gb = 10**9
    monkeypatch.delenv("QTORCH_GPU_SHARE", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * gb, 100 * gb))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * gb)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gb)
    device = torch.device("cuda", 0)
    assert free_bytes(device) == 72 * gb  # what is cached is free
    monkeypatch.setenv("QTORCH_GPU_SHARE", "0.25")
    assert free_bytes(device) == 17 * gb
    assert free_bytes(torch.device("cpu")) is None
    for text in ("0", "2", "half"):
        monkeypatch.setenv("QTORCH_GPU_SHARE", text)
        with pytest.raises(ConfigError, match="QTORCH_GPU_SHARE"):
            gpu_share()


@pytest.mark.gpu
def test_features_of_a_gpu_equal_those_of_the_cpu():
    torch.testing.assert_close(
        feature_values(device="cuda"), feature_values(), rtol=1e-5, atol=1e-6, equal_nan=True
    )
