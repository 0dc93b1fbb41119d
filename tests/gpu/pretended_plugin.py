"""A plugin of pytest that runs the tests marked `gpu` on the pretended device.

PYTHONPATH=tests/gpu pytest -p pretended_plugin -m gpu
"""

from __future__ import annotations

from collections.abc import Generator

from pretended_cuda import PretendedCuda  # before torch

# isort: split
import pytest
import torch


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with PretendedCuda():
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems() -> Generator[None, None, None]:
    """Keep the tests from being skipped because there is no device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        yield
