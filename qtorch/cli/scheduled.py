"""A job of a scheduler (SLURM, Kubernetes, ...) that is started again goes on in its run."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping

from qtorch.cli import slurm
from qtorch.core.errors import ConfigError
from qtorch.core.stops import NOTICES, noted
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

JOB_TAG = "qtorch.job"
JOB_VARIABLE = "QTORCH_JOB"
NAME = re.compile(r"[\w.:/\-]+")


def scheduled_job() -> str | None:
    """A name that this job keeps however often the scheduler starts it again; None outside one.

    QTORCH_JOB gives it (of a Kubernetes job: its name), else it is SLURM's job id; each task of
    an array has its own.
    """
    given = os.environ.get(JOB_VARIABLE)
    if given:
        if not NAME.fullmatch(given):
            raise ConfigError(f"{JOB_VARIABLE}={given!r}: letters, digits, - _ . : / make a name.")
        return given
    id = os.environ.get("SLURM_JOB_ID")
    return None if id is None else f"{os.environ.get('SLURM_CLUSTER_NAME', 'slurm')}.{id}"


def _starts_again() -> bool:
    return bool(os.environ.get(JOB_VARIABLE)) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def earlier_attempt(experiment_name: str, tags: Mapping[str, str]) -> dict[str, str] | None:
    """The run that an earlier start of this scheduler's job began, for `task_train(run=...)`.

    `tags` tell the task; JOB_TAG is among them where there is a job. None where this is the first
    start.
    """
    if JOB_TAG not in tags or not _starts_again():
        return None
    experiment = R.get_exp(experiment_name=experiment_name)
    mine = f"tags.`{JOB_TAG}` = '{tags[JOB_TAG]}'"
    for run in experiment.list_recorders(rtype="list", filter_string=mine):
        if run.status != Recorder.STATUS_FA and tags.items() <= run.list_tags().items():
            log.info("run %s of this job's earlier start goes on", run.id)
            return {"experiment_id": experiment.id, "recorder_id": run.id}
    return None


def queued_again() -> str | None:
    """After a notice: SLURM's job back into the queue, and what to tell of it; else None.

    SIGUSR1 is the notice that a user asks SLURM for (`--signal=USR1@60`) to go on after the time
    limit. SIGTERM is what SLURM sends when it takes the node away for another job, and what
    `scancel` sends, which ends for good: SLURM is asked which. This is the last thing that a
    process does, for SLURM ends it at once.
    """
    id, heard = os.environ.get("SLURM_JOB_ID"), {noted.asked, noted.answered, *noted.further}
    if not heard.intersection(NOTICES):
        return None
    try:
        job = slurm.own_job()
        if job is None:
            return None
        if not slurm.is_queued_by_slurm(job):
            if signal.SIGUSR1 not in heard and not slurm.is_preempted(job):
                return None
            slurm.requeue(job)
    except slurm.SlurmError as error:
        return f"SLURM job {id} could not be queued again: {error}"
    return f"SLURM job {id} is queued again, and goes on in this run."
