"""The GPUs of a sweep's jobs that run in processes of joblib."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtorch.core.runtime import gpu_share_variables
from qtorch.task.devices import VISIBLE_DEVICES, assign_gpus, jobs_per_gpu, visible_gpus

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
# The number of a process of joblib, which is that of its first job: the processes that run at once
# have different ones. A process runs one job after another, and all of them use the same GPUs.
PROCESS_VARIABLE = "QTORCH_JOBLIB_PROCESS"


def job_gpu_environment(config: DictConfig, hydra: Any) -> dict[str, str]:
    """Return the environment variables that give a job of joblib its own GPUs.

    They are empty for other launchers, without a GPU, and where the jobs name their devices
    (`trainer.devices=[1]`, or -1).
    """
    if str(hydra.launcher._target_) != JOBLIB:
        return {}
    num_processes = int(hydra.launcher.n_jobs)
    num_processes = num_processes if num_processes > 0 else os.cpu_count() or 1
    number = int(os.environ.setdefault(PROCESS_VARIABLE, str(hydra.job.num)))
    return assign_process_gpus(config, num_processes, number)


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
