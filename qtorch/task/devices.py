"""Detect the GPUs of this machine without torch, so that the worker process stays small."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import takewhile

from qtorch.core.errors import ConfigError
from qtorch.core.runtime import gpu_share_variables

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
CPU = "cpu"
NVIDIA_SMI_SECONDS = 20.0
_GPU_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")


def device_names(devices: str | None = None) -> list[str]:
    """Return the devices of a worker's slots: values of CUDA_VISIBLE_DEVICES, or "cpu".

    `devices` is None or "auto" (all visible GPUs, else the CPU), "cpu", or a list such as "0,1"
    (numbers, or names that CUDA accepts). Raises ConfigError for an empty list.
    """
    if devices in (None, "auto"):
        return visible_gpus() or [CPU]
    names = [name.strip() for name in str(devices).split(",") if name.strip()]
    if not names or (CPU in names and len(set(names)) > 1):
        raise ConfigError(
            f"devices={devices}: expected auto, cpu, or GPUs such as 0,1 (for several slots per "
            "device, set per_device=2)."
        )
    return names


def assign_gpus(names: Sequence[str], count: int, position: int) -> str:
    """Assign `count` GPUs to the job at `position`, round-robin; return CUDA_VISIBLE_DEVICES.

    Raises ConfigError if fewer than `count` GPUs are available.
    """
    if count > len(names):
        raise ConfigError(
            f"each job requests {count} GPUs, but this process sees only {len(names)}."
        )
    return ",".join(names[(position * count + k) % len(names)] for k in range(count))


def jobs_per_gpu(num_jobs: int, num_gpus: int, num_visible: int) -> int:
    """Return how many of the jobs that run at once, with `num_gpus` each, share a GPU at most."""
    return -(-num_jobs * num_gpus // num_visible) if num_visible else 1


def device_environment(name: str, num_processes: int = 1) -> dict[str, str]:
    """Return the environment variables that restrict a process to this device.

    `num_processes` share its memory.
    """
    if name == CPU:
        return {VISIBLE_DEVICES: ""}
    return {VISIBLE_DEVICES: name, **gpu_share_variables(num_processes)}


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, from CUDA_VISIBLE_DEVICES or nvidia-smi.

    A GPU that is divided (MIG) stands for its parts, by their UUIDs: CUDA ignores its number. An
    invalid name in the variable (-1, or SLURM's NoDevFiles) hides itself and those after it.
    """
    variable = os.environ.get(VISIBLE_DEVICES)
    if variable is not None:
        names = (name.strip() for name in variable.split(","))
        return list(takewhile(_GPU_NAME.fullmatch, names))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        process = subprocess.run(
            [tool, "-L"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _parse_gpu_list(process.stdout) if process.returncode == 0 else []


def _parse_gpu_list(text: str) -> list[str]:
    """Return the names in the output of `nvidia-smi -L`: numbers, or UUIDs of parts of GPUs."""
    gpus: list[list[str]] = []  # of each GPU its number, or its parts
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            gpus.append([match[1]])
        elif match := re.match(r"\s+MIG .*UUID: (MIG-[^)\s]+)\)", line):
            gpus[-1] = [*(name for name in gpus[-1] if not name.isdigit()), match[1]]
    return [name for names in gpus for name in names]
