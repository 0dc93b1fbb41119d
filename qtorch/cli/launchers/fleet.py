"""`runner=fleet`: train the jobs of a sweep at once, as the members of a fleet in this process."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qtorch.cli.jobs.finished_jobs import compose_job, use_hydra_config
from qtorch.cli.jobs.job import collect_requests
from qtorch.cli.jobs.work import execute_job
from qtorch.cli.launchers.base import Jobs, UnfinishedJobsMixin
from qtorch.cli.launchers.kinds import SharedProcessLauncher
from qtorch.core.runtime import change_environment
from qtorch.core.session import FOLDER_VARIABLE

log = logging.getLogger(__name__)


class FleetLauncher(UnfinishedJobsMixin, SharedProcessLauncher, Launcher):
    """Trains jobs whose networks have one architecture at once, each in its own run.

    See `qtorch.model.fit_fleet`. `max_members`: how many jobs are trained at once; None: as many as
    the memory bears, on a CPU at most 64. Jobs that cannot be trained together are trained one
    after another, and a log line says why.
    """

    def __init__(self, max_members: int | None) -> None:
        self.max_members = max_members

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the context, function and configuration, as Hydra requires."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def _run_jobs(self, jobs: Jobs) -> dict[int, JobReturn]:
        from qtorch.model.fleet.fleet import Fleet

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        returns = {}
        with collect_requests() as requests:
            for number, overrides in jobs.items():
                log.info("\t#%d : %s", number, " ".join(o for o in overrides if "hydra." not in o))
                job = compose_job(self.hydra_context, self.config, number, overrides)
                with use_hydra_config(job):
                    returns[number] = run_job(
                        hydra_context=self.hydra_context,
                        task_function=self.task_function,
                        config=job,
                        job_dir_key="hydra.sweep.dir",
                        job_subdir_key="hydra.sweep.subdir",
                    )
        with change_environment({FOLDER_VARIABLE: os.getcwd()}):
            Fleet(self.max_members).run([partial(execute_job, request) for request in requests])
        return returns
