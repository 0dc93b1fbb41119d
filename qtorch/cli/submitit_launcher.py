"""`hydra/launcher=submitit_slurm` and `submitit_local`: Hydra's own, for the jobs that are left.

Jobs that are finished are told of at once (`qtorch.cli.settled_jobs`); the others are one array,
each with the number that it has in the sweep. All of them are waited for: one that is lost for
good is a failed job of the sweep.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from qtorch.cli.guard import error_line
from qtorch.cli.slurm import SlurmError, asked_of, has_ended
from qtorch.core.errors import ConfigError
from qtorch.core.launch import external_world
from qtorch.task.devices import VISIBLE, in_turn, visible

OF_THE_EXECUTOR = ("submitit_folder", "max_num_timeout")
LOOK_SECONDS = 15.0  # between two questions to SLURM
RESULT_SECONDS = 15.0  # for the result of a job that has ended, on a slow file system


class Lost(Exception):
    """A job that has ended without a result; the message says what is known of it."""


def ended(job: Any) -> str:
    """Wait for the end of a job of SLURM's; its last state.

    SLURM itself is asked too, for submitit asks its accounting, which not every cluster has.
    """
    asked = float("-inf")
    while not job.done():
        time.sleep(1.0)
        if time.monotonic() - asked < LOOK_SECONDS:
            continue
        asked = time.monotonic()
        try:
            told = asked_of(job.job_id)
        except SlurmError:
            continue
        if has_ended(told):
            return told.get("JobState", "no such job any more")
    return str(job.state)


def left_no_result(job: Any) -> bool:
    """Whether a job that has ended has left none, a slow file system granted."""
    end = time.monotonic() + RESULT_SECONDS
    while not job.paths.result_pickle.exists():
        if time.monotonic() > end:
            return True
        time.sleep(0.5)
    return False


def one_line(error: Exception) -> str:
    """An error of a job's own, which submitit has kept as a traceback: its last line."""
    parts = re.split(r"\n-{10,}\n", str(error))
    return (parts[1] if len(parts) > 2 else str(error)).strip().splitlines()[-1]


try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher as theirs
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
except ImportError:  # an optional package
    SUBMITIT_LAUNCHERS: tuple[type[Launcher], ...] = ()
else:

    class _ForJobsLeft:
        """Mixed into launchers without types: mypy can neither see them nor subclass them."""

        def launch(
            self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> Sequence[JobReturn]:
            """Run the jobs that have something to do, and wait for all of them."""
            from qtorch.cli.settled_jobs import settled_jobs  # with torch

            jobs = dict(enumerate(job_overrides, initial_job_idx))
            returns = settled_jobs(self.hydra_context, self.config, jobs)
            left = {n: list(overrides) for n, overrides in jobs.items() if n not in returns}
            if left:
                for number, job in zip(left, self._submitted(left), strict=True):
                    returns[number] = self._outcome(number, left[number], job.task(0))
            return [returns[n] for n in jobs]

        def _submitted(self: Any, jobs: Mapping[int, list[str]]) -> Sequence[Any]:
            """What submitit has made of the jobs."""
            import submitit

            kind, settings = self._EXECUTOR, dict(self.params)
            folder, timeouts = (settings.pop(name, None) for name in OF_THE_EXECUTOR)
            own = {} if timeouts is None else {f"{kind}_max_num_timeout": timeouts}
            executor = submitit.AutoExecutor(folder=folder, cluster=kind, **own)
            shared = vars(BaseQueueConf())
            executor.update_parameters(
                **{k if k in shared else f"{kind}_{k}": v for k, v in settings.items()}
            )
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            state = Singleton.get_state()
            arguments = [
                (overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", state)
                for number, overrides in jobs.items()
            ]
            return executor.map_array(self, *zip(*arguments, strict=True))

        def _outcome(self: Any, number: int, overrides: list[str], job: Any) -> JobReturn:
            """What Hydra is told of a job, once it has ended; never an error."""
            try:
                returned: JobReturn = self._result(job)
                if returned.status == JobStatus.COMPLETED:
                    return returned
                why = error_line(returned._return_value)
            except Exception as error:
                why = one_line(error)
            from qtorch.cli.lost import note_lost_job
            from qtorch.cli.settled_jobs import composed_job

            config = composed_job(self.hydra_context, self.config, number, overrides)
            why = f"job {job.job_id} of {self._EXECUTOR}: {why}"
            if job.paths.stderr.exists():
                why += f"; see {job.paths.stderr}"
            return note_lost_job(config, number, overrides, why, closed=False)

    class SubmititSlurmLauncher(_ForJobsLeft, theirs.SlurmLauncher):  # type: ignore[misc]  # likewise
        """Jobs of SLURM."""

        def _result(self, job: Any) -> JobReturn:
            state = ended(job)
            if left_no_result(job):
                raise Lost(f"it has ended without a result ({state})")
            return job.results()[0]  # type: ignore[no-any-return]  # see above

        def __call__(
            self, sweep_overrides: list[str], key: str, number: int, id: str, state: Any
        ) -> JobReturn:
            """One job, in its process; of several processes the first does it, the others train
            along."""
            world = external_world()
            if world is None:
                return super().__call__(sweep_overrides, key, number, id, state)  # type: ignore[no-any-return]  # see above
            from qtorch.model.external import hosting, serve

            if world.rank > 0:
                serve(world)
                return JobReturn(status=JobStatus.COMPLETED)
            with hosting(world) as outcome:
                returned: JobReturn = super().__call__(sweep_overrides, key, number, id, state)
                outcome["code"] = 0
            return returned

    class SubmititLocalLauncher(_ForJobsLeft, theirs.LocalLauncher):  # type: ignore[misc]  # likewise
        """Processes of this machine."""

        devices: Mapping[int, str | None]  # for CUDA_VISIBLE_DEVICES of each job

        def _submitted(self, jobs: Mapping[int, list[str]]) -> Sequence[Any]:
            tasks = self.params["tasks_per_node"]
            if tasks != 1:
                raise ConfigError(
                    f"hydra.launcher.tasks_per_node={tasks}: submitit_local has one process a job; "
                    "the training itself starts those of its devices: trainer=ddp trainer.devices=2"
                )
            count = self.params["gpus_per_node"]
            if count is None:
                self.devices = dict.fromkeys(jobs, os.environ.get(VISIBLE))
            else:
                names = visible()
                self.devices = {n: in_turn(names, count, k) for k, n in enumerate(jobs)}
            return super()._submitted(jobs)

        def _result(self, job: Any) -> JobReturn:
            job.wait()
            if not job.paths.result_pickle.exists():
                raise Lost("it has ended without a result (out of memory?)")
            return job.results()[0]  # type: ignore[no-any-return]  # see above

        def __call__(
            self, sweep_overrides: list[str], key: str, number: int, id: str, state: Any
        ) -> JobReturn:
            """One job, in its process; submitit itself would show it no GPU, or the first ones."""
            devices = self.devices[number]
            os.environ.pop(VISIBLE, None)
            if devices is not None:
                os.environ[VISIBLE] = devices
            return super().__call__(sweep_overrides, key, number, id, state)  # type: ignore[no-any-return]  # see above

    SUBMITIT_LAUNCHERS = (SubmititLocalLauncher, SubmititSlurmLauncher)
