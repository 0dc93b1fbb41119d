"""`hydra/launcher=submitit_slurm` and `submitit_local`: Hydra's launchers, for unfinished jobs.

The unfinished jobs form one job array. The launcher waits for all of them: a job that is lost for
good is a failed job of the sweep.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from qtorch.cli.guard import error_line
from qtorch.cli.launchers.base import Jobs, UnfinishedJobsMixin
from qtorch.cli.launchers.kinds import DetachedLauncher
from qtorch.cli.launchers.quick_start import QuickStart
from qtorch.cli.launchers.slurm import SlurmError, has_ended, query_job
from qtorch.core.errors import ConfigError
from qtorch.core.runtime import gpu_share_variables
from qtorch.process.launch import external_world
from qtorch.task.devices import VISIBLE_DEVICES, assign_gpus, jobs_per_gpu, visible_gpus

EXECUTOR_OPTIONS = ("submitit_folder", "max_num_timeout")
QUERY_SECONDS = 15.0  # between two SLURM queries
RESULT_SECONDS = 15.0  # wait for the result of an ended job on a slow file system


class LostJobError(Exception):
    """A job ended without a result; the message says what is known about it."""


def wait_for_job(job: Any) -> str:
    """Wait until a SLURM job has ended and return its last state.

    This also asks SLURM's controller, because submitit asks the accounting database, which not
    every cluster has.
    """
    last_query = float("-inf")
    while not job.done():
        time.sleep(1.0)
        if time.monotonic() - last_query < QUERY_SECONDS:
            continue
        last_query = time.monotonic()
        try:
            record = query_job(job.job_id)
        except SlurmError:
            continue
        if has_ended(record):
            return record.get("JobState", "unknown job")
    return str(job.state)


def has_no_result(job: Any) -> bool:
    """Whether an ended job has left no result; waits a while for slow file systems."""
    end = time.monotonic() + RESULT_SECONDS
    while not job.paths.result_pickle.exists():
        if time.monotonic() > end:
            return True
        time.sleep(0.5)
    return False


def last_error_line(error: Exception) -> str:
    """Return the last line of a job's error, which submitit stores as a traceback."""
    parts = re.split(r"\n-{10,}\n", str(error))
    return (parts[1] if len(parts) > 2 else str(error)).strip().splitlines()[-1]


try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher as hydra_submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
except ImportError:  # optional dependency
    SUBMITIT_LAUNCHERS: tuple[type[Launcher], ...] = ()
else:

    class _ArrayLauncher(UnfinishedJobsMixin, DetachedLauncher):
        """A mixin for Hydra's launchers, which have no types: mypy cannot see or subclass them."""

        def _run_jobs(self, jobs: Jobs) -> dict[int, JobReturn]:
            return {
                number: self._job_return(number, jobs[number], job.task(0))
                for number, job in zip(jobs, self._submit(jobs), strict=True)
            }

        def _submit(self: Any, jobs: Jobs) -> Sequence[Any]:
            """Submit the jobs as one array and return submitit's job objects."""
            import submitit

            kind, settings = self._EXECUTOR, dict(self.params)
            folder, max_timeouts = (settings.pop(name, None) for name in EXECUTOR_OPTIONS)
            timeout_options = (
                {} if max_timeouts is None else {f"{kind}_max_num_timeout": max_timeouts}
            )
            executor = submitit.AutoExecutor(folder=folder, cluster=kind, **timeout_options)
            common_parameters = vars(BaseQueueConf())
            executor.update_parameters(
                **{k if k in common_parameters else f"{kind}_{k}": v for k, v in settings.items()}
            )
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            state = Singleton.get_state()
            arguments = [
                (overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state)
                for number, overrides in jobs.items()
            ]
            return executor.map_array(QuickStart(self), *zip(*arguments, strict=True))

        def _job_return(self: Any, number: int, overrides: list[str], job: Any) -> JobReturn:
            """Wait for a job and return its JobReturn; never raises an error."""
            try:
                job_return: JobReturn = self._load_result(job)
                if job_return.status == JobStatus.COMPLETED:
                    return job_return
                reason = error_line(job_return._return_value)
            except Exception as error:
                reason = last_error_line(error)
            reason = f"job {job.job_id} of {self._EXECUTOR}: {reason}"
            if job.paths.stderr.exists():
                reason += f"; see {job.paths.stderr}"
            job_return = self._record_lost_job(number, overrides, reason, close_run=False)
            return job_return

    class SubmititSlurmLauncher(_ArrayLauncher, hydra_submitit.SlurmLauncher):  # type: ignore[misc]  # the base class has no types
        """Run the jobs on SLURM."""

        def _load_result(self, job: Any) -> JobReturn:
            state = wait_for_job(job)
            if has_no_result(job):
                raise LostJobError(f"the job ended without a result ({state})")
            return job.results()[0]  # type: ignore[no-any-return]  # the base class has no types

        def __call__(
            self, sweep_overrides: list[str], key: str, number: int, id: str, state: Any
        ) -> JobReturn:
            """Run one job in its process; of several processes the first one runs it.

            The others serve its training as ranks.
            """
            world = external_world()
            if world is None:
                return super().__call__(sweep_overrides, key, number, id, state)  # type: ignore[no-any-return]  # the base class has no types
            from qtorch.model.devices.launcher import host_ranks, serve_ranks

            if world.rank > 0:
                serve_ranks(world)
                return JobReturn(status=JobStatus.COMPLETED)
            with host_ranks(world) as outcome:
                job_return: JobReturn = super().__call__(sweep_overrides, key, number, id, state)
                outcome["code"] = 0
            return job_return

    class SubmititLocalLauncher(_ArrayLauncher, hydra_submitit.LocalLauncher):  # type: ignore[misc]  # the base class has no types
        """Run the jobs in processes on this machine."""

        devices: Mapping[int, str | None]  # for CUDA_VISIBLE_DEVICES of each job
        share: Mapping[str, str] = MappingProxyType({})

        def _submit(self, jobs: Jobs) -> Sequence[Any]:
            tasks = self.params["tasks_per_node"]
            if tasks != 1:
                raise ConfigError(
                    f"hydra.launcher.tasks_per_node={tasks}: submitit_local runs one process per "
                    "job; the training itself starts one per device: trainer=ddp trainer.devices=2"
                )
            count = self.params["gpus_per_node"]
            if count is None:
                self.devices = dict.fromkeys(jobs, os.environ.get(VISIBLE_DEVICES))
            else:
                names = visible_gpus()
                self.devices = {n: assign_gpus(names, count, k) for k, n in enumerate(jobs)}
                self.share = gpu_share_variables(jobs_per_gpu(len(jobs), count, len(names)))
            return super()._submit(jobs)

        def _load_result(self, job: Any) -> JobReturn:
            job.wait()
            if not job.paths.result_pickle.exists():
                raise LostJobError("the job ended without a result (out of memory?)")
            return job.results()[0]  # type: ignore[no-any-return]  # the base class has no types

        def __call__(
            self, sweep_overrides: list[str], key: str, number: int, id: str, state: Any
        ) -> JobReturn:
            """Run one job in its process with the GPUs assigned to it.

            submitit itself would hide all GPUs, or assign the first ones to every job.
            """
            devices = self.devices[number]
            os.environ.pop(VISIBLE_DEVICES, None)
            if devices is not None:
                os.environ[VISIBLE_DEVICES] = devices
            os.environ.update(self.share)
            return super().__call__(sweep_overrides, key, number, id, state)  # type: ignore[no-any-return]  # the base class has no types

    SUBMITIT_LAUNCHERS = (SubmititLocalLauncher, SubmititSlurmLauncher)
