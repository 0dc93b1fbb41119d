"""Jobs of a sweep with nothing left to do: they are told of here, and no cluster is asked for them.

A sweep of hundreds of jobs that is started again would otherwise queue each of them, to find in
its process that it is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from qtorch.cli.segments import Calendars, with_dates
from qtorch.cli.sweep import FINISHED, JobResult
from qtorch.cli.sweep_start import LOCAL, plain_words, the_sweep
from qtorch.cli.work import note_outcome, place_of, print_failure, print_skipped
from qtorch.core.errors import QtorchError
from qtorch.core.instantiate import plain
from qtorch.core.runtime import progress
from qtorch.study.sweep_job import has_settled_jobs, settled_sweep_job

Jobs = Mapping[int, Sequence[str]]


def settled_jobs(context: HydraContext, config: DictConfig, jobs: Jobs) -> dict[int, JobReturn]:
    """What Hydra is told of the jobs, by number, that are finished or that failed for good.

    Each has its result in its folder, as if it had been run. A job that cannot be looked at is
    left to the launcher, whose error it then is.
    """
    sweep = the_sweep()
    if sweep is None or sweep.recorder is None or config.runner != LOCAL:
        return {}
    if not has_settled_jobs(config.experiment_name):
        return {}  # nothing was ever run: the usual case costs nothing
    settled: dict[int, JobReturn] = {}
    calendars: Calendars = {}
    for number, overrides in progress(list(jobs.items()), "look for finished jobs"):
        job = composed_job(context, config, number, overrides)
        with as_hydras(job):
            try:
                told = _settled(job, number, str(sweep.recorder.id), calendars)
            except QtorchError:
                continue
        if told is not None:
            settled[number] = told
    return settled


def _settled(job: DictConfig, number: int, sweep_id: str, calendars: Calendars) -> JobReturn | None:
    hydra = HydraConfig.get()
    settings = plain(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"]))
    words = plain_words(hydra.overrides.task)
    place = place_of(settings, sweep_id, number, words)
    task = with_dates(settings["task"], calendars)
    outcome = settled_sweep_job(task, place, settings["experiment_name"])
    if outcome is None:
        return None
    run = outcome.recorder
    result = JobResult(number, words, FINISHED, 0.0, str(run.id), metrics=run.list_metrics())
    result.experiment = getattr(run, "experiment_name", None)
    note_outcome(result, outcome)
    folder = Path(str(hydra.sweep.dir), str(hydra.sweep.subdir))
    folder.mkdir(parents=True, exist_ok=True)
    result.store(folder)
    if result.error is None:
        print_skipped(result)
    else:
        print_failure(result)
    returned = JobReturn(overrides=words, cfg=job, status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned


def composed_job(
    context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str]
) -> DictConfig:
    """The configuration of one job of a sweep, as Hydra composes it."""
    job: DictConfig = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.num = number
        job.hydra.job.id = f"job_id_for_{number}"
    return job


@contextmanager
def as_hydras(job: DictConfig) -> Iterator[None]:
    """The job's configuration as Hydra's own, which values may refer to."""
    instance = HydraConfig.instance()
    before: Any = instance.cfg
    instance.set_config(job)
    try:
        yield
    finally:
        instance.cfg = before
