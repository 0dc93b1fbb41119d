"""Resume the run of a job that its scheduler (SLURM, Kubernetes, ...) starts again."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping

from qtorch.cli import slurm
from qtorch.core.errors import ConfigError
from qtorch.core.stops import SCHEDULER_SIGNALS, stop_state
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

JOB_TAG = "qtorch.job"
JOB_VARIABLE = "QTORCH_JOB"
NAME = re.compile(r"[\w.:/\-]+")


def scheduler_job_name() -> str | None:
    """Return a job name that stays the same when the scheduler restarts the job; None without one.

    It is QTORCH_JOB if set (for example the name of a Kubernetes job), otherwise SLURM's job ID;
    each task of an array has its own.
    """
    job_name = os.environ.get(JOB_VARIABLE)
    if job_name:
        if not NAME.fullmatch(job_name):
            raise ConfigError(
                f"{JOB_VARIABLE}={job_name!r}: use only letters, digits and - _ . : / in "
                "a job name."
            )
        return job_name
    id = os.environ.get("SLURM_JOB_ID")
    return None if id is None else f"{os.environ.get('SLURM_CLUSTER_NAME', 'slurm')}.{id}"


def _is_restart() -> bool:
    return bool(os.environ.get(JOB_VARIABLE)) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def find_earlier_attempt(experiment_name: str, tags: Mapping[str, str]) -> dict[str, str] | None:
    """Find the run of an earlier start of this scheduler job, for `task_train(run=...)`.

    `tags` identify the task, and contain JOB_TAG if there is a scheduler job. Returns None on the
    first start of the job.
    """
    if JOB_TAG not in tags or not _is_restart():
        return None
    experiment = R.get_exp(experiment_name=experiment_name)
    filter_string = f"tags.`{JOB_TAG}` = '{tags[JOB_TAG]}'"
    for run in experiment.list_recorders(rtype="list", filter_string=filter_string):
        if run.status != Recorder.STATUS_FA and tags.items() <= run.list_tags().items():
            log.info("resuming run %s of an earlier start of this job", run.id)
            return {"experiment_id": experiment.id, "recorder_id": run.id}
    return None


def requeue_slurm_job() -> str | None:
    """Requeue the SLURM job after a stop signal; return a message, or None if nothing was requeued.

    Users request SIGUSR1 from SLURM (`--signal=USR1@60`) to continue after the time limit. SLURM
    sends SIGTERM when it preempts the job, but also for `scancel`, which ends the job for good:
    SLURM is asked which it is. This must be the last step of the process, because SLURM ends it
    immediately.
    """
    id, received_signals = (
        os.environ.get("SLURM_JOB_ID"),
        {stop_state.interrupt_signal, stop_state.training_signal, *stop_state.later_signals},
    )
    if not received_signals.intersection(SCHEDULER_SIGNALS):
        return None
    try:
        job = slurm.current_job()
        if job is None:
            return None
        if not slurm.is_requeued_by_slurm(job):
            if signal.SIGUSR1 not in received_signals and not slurm.is_preempted(job):
                return None
            slurm.requeue(job)
    except slurm.SlurmError as error:
        return f"cannot requeue SLURM job {id}: {error}"
    return f"requeued SLURM job {id}; it will resume this run."
