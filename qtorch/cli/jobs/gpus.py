"""The GPUs of a sweep's jobs that run in processes of joblib."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtorch.core.runtime import gpu_share_variables
from qtorch.task.devices import VISIBLE_DEVICES, assign_gpus, jobs_per_gpu, visible_gpus

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
# The environment of this process's jobs. A process of joblib runs one job after another, and stays
# on its GPUs: its first job finds them, by a number that differs from that of the other processes.
_environment: dict[str, str] | None = None


def job_gpu_environment(config: DictConfig, hydra: Any) -> dict[str, str]:
    """Return the environment variables that give a job of joblib its own GPUs.

    They are empty for other launchers, without a GPU, and where the jobs name their devices
    (`trainer.devices=[1]`, or -1).
    """
    global _environment
    if str(hydra.launcher._target_) != JOBLIB:
        return {}
    if _environment is None:
        num_processes = int(hydra.launcher.n_jobs)
        num_processes = num_processes if num_processes > 0 else os.cpu_count() or 1
        _environment = assign_process_gpus(config, num_processes, int(hydra.job.num))
    return _environment


def assign_process_gpus(config: DictConfig, num_processes: int, number: int) -> dict[str, str]:
    """Return the variables of process `number` of those that run at once."""
    names, count = visible_gpus(), _num_gpus(config)
    if not names or count is None or count > len(names):
        return {}
    return {
        VISIBLE_DEVICES: assign_gpus(names, count, number),
        **gpu_share_variables(jobs_per_gpu(num_processes, count, len(names))),
    }


def _num_gpus(config: DictConfig) -> int | None:
    """Return how many GPUs a job uses; None if it names them, or takes all or none."""
    trainer = OmegaConf.select(config, "trainer", default=None) or {}
    devices = trainer.get("devices")
    if trainer.get("accelerator") == "cpu" or isinstance(devices, bool):
        return None
    if devices in (None, "auto"):
        return 1
    try:
        count = int(devices)
    except (TypeError, ValueError):
        return None
    return count if count > 0 else None
