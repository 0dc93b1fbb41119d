"""The GPUs of this machine, found without torch: a supervisor stays small."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from qtorch.core.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "cpu"
ASK_SECONDS = 20.0


def device_names(given: str | None = None) -> list[str]:
    """What each place of a worker works on: names for CUDA_VISIBLE_DEVICES, or `cpu`.

    `given` is None or "auto" (every GPU that this process may see, else the CPU), "cpu", or a
    list "0,1" (numbers, or the names that CUDA takes). Raises ConfigError for an empty list.
    """
    if given in (None, "auto"):
        return visible() or [CPU]
    names = [name.strip() for name in str(given).split(",") if name.strip()]
    if not names or (CPU in names and len(set(names)) > 1):
        raise ConfigError(
            f"devices={given}: expected auto, cpu, or GPUs such as 0,1 (several workers to a "
            "device: per_device=2)."
        )
    return names


def in_turn(names: Sequence[str], count: int, position: int) -> str:
    """The `count` GPUs of the job at that position, where jobs take them in turn: a value of
    CUDA_VISIBLE_DEVICES. Raises ConfigError where there are not as many."""
    if count > len(names):
        raise ConfigError(
            f"{count} GPUs are asked for each job, but this process sees {len(names)}."
        )
    return ",".join(names[(position * count + k) % len(names)] for k in range(count))


def device_environment(name: str) -> dict[str, str]:
    """The variables that show a process this device alone."""
    return {VISIBLE: "" if name == CPU else name}


def visible() -> list[str]:
    """The GPUs that this process may use: the environment's (a scheduler's), else nvidia-smi's."""
    allowed = os.environ.get(VISIBLE)
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        asked = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return asked.stdout.split() if asked.returncode == 0 else []
