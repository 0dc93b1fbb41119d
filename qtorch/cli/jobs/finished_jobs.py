"""Skip the finished jobs of a sweep before the launcher queues them.

Otherwise a sweep of hundreds of jobs that is started again would queue each job on the cluster,
only to find in the job's process that it is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from qtorch.cli.compose import LOCAL, job_task
from qtorch.cli.jobs.results import FINISHED, command_results
from qtorch.cli.jobs.sweep_command import current_sweep, task_overrides
from qtorch.cli.jobs.work import (
    apply_outcome,
    print_failure,
    print_skipped_job,
    sweep_member,
)
from qtorch.core.errors import QtorchError
from qtorch.core.instantiate import resolve_config
from qtorch.core.runtime import progress
from qtorch.core.secrets import complete_tree
from qtorch.study.sweep import JobResult
from qtorch.study.sweep_job import find_finished_job, has_finished_jobs
from qtorch.trainer.segments import Calendars

log = logging.getLogger(__name__)

Jobs = Mapping[int, Sequence[str]]


def skip_finished_jobs(
    context: HydraContext, config: DictConfig, jobs: Jobs
) -> dict[int, JobReturn]:
    """Return the JobReturns of the jobs, by number, that are finished or have failed for good.

    Each gets a result in its folder, as if it had been run. A job that cannot be checked is left to
    the launcher, with a warning: its process checks it again.
    """
    sweep = current_sweep()
    if sweep is None or sweep.recorder is None or config.runner != LOCAL:
        return {}
    if not has_finished_jobs(config.experiment_name):
        return {}  # the first start of a sweep: skip the checks
    job_returns: dict[int, JobReturn] = {}
    calendars: Calendars = {}
    for number, overrides in progress(list(jobs.items()), "checking for finished jobs"):
        job = compose_job(context, config, number, overrides)
        with use_hydra_config(job):
            try:
                job_return = _skip_job(job, number, str(sweep.recorder.id), calendars)
            except QtorchError as error:
                log.warning(
                    "job %d is submitted, because the check of whether it is finished failed: %s",
                    number,
                    error,
                )
                continue
        if job_return is not None:
            job_returns[number] = job_return
    return job_returns


def _skip_job(
    job: DictConfig, number: int, sweep_id: str, calendars: Calendars
) -> JobReturn | None:
    hydra = HydraConfig.get()
    settings = complete_tree(
        resolve_config(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"]))
    )
    task_words = task_overrides(hydra.overrides.task)
    member = sweep_member(settings, sweep_id, number, task_words)
    task = job_task(settings, calendars)
    outcome = find_finished_job(task, member, settings["experiment_name"])
    if outcome is None:
        return None
    run = outcome.recorder
    result = JobResult(
        number,
        task_words,
        FINISHED,
        run_id=str(run.id),
        experiment=getattr(run, "experiment_name", None),
        metrics=run.list_metrics(),
    )
    apply_outcome(result, outcome)
    command_results.store(result, Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)))
    if result.error is None:
        print_skipped_job(result, outcome)
    else:
        print_failure(result)
    job_return = JobReturn(overrides=task_words, cfg=job, status=JobStatus.COMPLETED)
    job_return.return_value = None
    return job_return


def compose_job(
    context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str]
) -> DictConfig:
    """Compose the configuration of one job of a sweep as Hydra does."""
    job: DictConfig = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
        job.hydra.job.id = f"job_id_for_{number}"
    return job


@contextmanager
def use_hydra_config(job: DictConfig) -> Iterator[None]:
    """Set the job's configuration as Hydra's own inside the block, for values that refer to it."""
    instance = HydraConfig.instance()
    previous: Any = instance.cfg
    instance.set_config(job)
    try:
        yield
    finally:
        instance.cfg = previous
