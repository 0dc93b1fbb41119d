"""A job of a scheduler (SLURM, Kubernetes, ...) that is started again goes on in its run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping

from qtorch.core.stops import answered
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

JOB_TAG = "qtorch.job"
JOB_VARIABLE = "QTORCH_JOB"
REQUEUE_SECONDS = 60.0


def scheduled_job() -> str | None:
    """A name that this job keeps however often the scheduler starts it again; None outside one.

    QTORCH_JOB gives it (of a Kubernetes job: its name), else it is SLURM's job id; each task of
    an array has its own.
    """
    given = os.environ.get(JOB_VARIABLE)
    if given:
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
    for run in experiment.list_recorders(rtype=experiment.RT_L):
        if run.status != Recorder.STATUS_FA and tags.items() <= run.list_tags().items():
            log.info("run %s of this job's earlier start goes on", run.id)
            return {"experiment_id": experiment.id, "recorder_id": run.id}
    return None


def queued_again() -> str | None:
    """After SIGUSR1: SLURM's job back into the queue, and what to tell of it; else None.

    SIGUSR1 is the notice that a user asks SLURM for (`--signal=USR1@60`) to go on after the time
    limit; SIGTERM is also what `scancel` sends, and ends for good. This is the last thing that a
    process does, for SLURM ends it at once.
    """
    id = os.environ.get("SLURM_JOB_ID")
    if answered() != signal.SIGUSR1 or id is None:
        return None
    try:
        told = subprocess.run(
            ["scontrol", "requeue", id], capture_output=True, text=True, timeout=REQUEUE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {id} could not be queued again: {error}"
    if told.returncode:
        return f"SLURM job {id} could not be queued again: {told.stderr.strip()}"
    return f"SLURM job {id} is queued again, and goes on in this run."
