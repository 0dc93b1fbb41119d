"""How much of a GPU's memory this process may plan with."""

from __future__ import annotations

import os

import torch

from qtorch.core.errors import ConfigError

# The part of each GPU that is this process's, where several share one: set by whoever starts them.
SHARE_VARIABLE = "QTORCH_GPU_SHARE"


def gpu_share() -> float:
    """Return the share of each GPU's memory that belongs to this process, at most 1.

    Raises ConfigError for a value of QTORCH_GPU_SHARE that is no share.
    """
    text = os.environ.get(SHARE_VARIABLE, "").strip() or "1"
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{SHARE_VARIABLE}={text!r}: expected a number above 0, at most 1.")
    return share


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes this process may still take of a GPU; None for the CPU.

    Memory that it holds without using it is free. Of a GPU that is shared by N processes, each
    takes 1/N at most, whoever comes first.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return max(0, min(free, int(gpu_share() * total) - allocated))
