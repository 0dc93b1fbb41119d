"""How much of a GPU's memory this process may plan with."""

from __future__ import annotations

import torch

from qtorch.core.runtime import gpu_share


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes this process may still take of a GPU; None for the CPU.

    Memory that it holds without using it is free. Of a GPU that is shared by N processes, each
    takes 1/N at most, whoever comes first (see `gpu_share`).
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return max(0, min(free, int(gpu_share() * total) - allocated))
