"""Where features are stored: on the device, or in host memory if they do not fit there."""

from __future__ import annotations

from typing import Literal

import torch

Store = Literal["auto", "device", "host"]
STORES: tuple[str, ...] = ("auto", "device", "host")
# The share of the device's free memory that the features may take; larger ones stay on the host.
DEVICE_SHARE = 0.6


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether `num_bytes` of features fit on a device besides everything else it must hold."""
    free = free_bytes(device)
    return free is None or num_bytes <= DEVICE_SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """Return a GPU's free memory; None for the CPU, where the features are stored anyway."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
