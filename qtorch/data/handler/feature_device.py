"""Where a handler's features are computed: on the CPU or on a GPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from qtorch.core.errors import ConfigError
from qtorch.core.runtime import resolve_device

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_current_device: ContextVar[torch.device] = ContextVar("qtorch_feature_device", default=CPU)


def check_feature_device(device: str) -> str:
    """Return the name of a device; raise ConfigError unless it is auto, cpu, cuda or cuda:i."""
    if not isinstance(device, str) or _DEVICE.fullmatch(device) is None:
        raise ConfigError(
            f"device={device!r} of the handler: expected auto (the first GPU if there is one), "
            "cpu, cuda, or one of several GPUs such as cuda:1."
        )
    return str(device)


@contextmanager
def use_feature_device(device: str) -> Iterator[None]:
    """Let loaders inside the block compute features on a device.

    "auto" is the first GPU, or the CPU with a line in the log. Raises ConfigError for a GPU that
    does not exist. The GPU's memory is free for others afterwards.
    """
    target = resolve_device(device)
    if device == "auto" and target == CPU:
        log.info("handler.device=auto: there is no CUDA device, so the CPU computes the features")
    token = _current_device.set(target)
    try:
        yield
    finally:
        _current_device.reset(token)
        if target.type == "cuda":
            torch.cuda.empty_cache()


def current_feature_device() -> torch.device:
    """Return the device of the innermost `use_feature_device` block; the CPU outside of any."""
    return _current_device.get()
