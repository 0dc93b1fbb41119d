"""Where features lie: on the device, or in host memory where they do not fit there."""

from __future__ import annotations

from typing import Literal

import torch

Store = Literal["auto", "device", "host"]
STORES: tuple[str, ...] = ("auto", "device", "host")
# Of the device's free memory, what the columns may take before they stay on the host.
DEVICE_SHARE = 0.6


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a device has room for so many bytes of features beside all else it is to hold."""
    free = free_bytes(device)
    return free is None or num_bytes <= DEVICE_SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """A GPU's free memory; None for the CPU, which is where the features are anyway."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
