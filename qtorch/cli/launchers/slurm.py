"""Jobs of SLURM and other schedulers: query and requeue them, and find an earlier start of a job.

A job that a scheduler stops and starts again must continue the same run. Its name, which the
restarts have in common, is a tag of the run.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.process.stops import (
    SCHEDULER_SIGNALS,
    StopSignals,
    interrupt_work,
    received_signals,
)
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

QUERY_TIMEOUT_SECONDS = 60.0
# SLURM has forgotten the job, or the job was cancelled before it started.
UNKNOWN_JOB = re.compile(r"Invalid job id|Job \S+ not found")
JOB_TAG = "qtorch.job"  # tag of a run: the name of the scheduler's job
JOB_VARIABLE = "QTORCH_JOB"
JOB_NAME_PATTERN = re.compile(r"[\w.:/\-]+")
# Variables of submitit: the signal on which it requeues a job, and the kind of executor in a job.
SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
STOP_SIGNAL = signal.SIGUSR1
EXECUTOR_VARIABLE = "SUBMITIT_EXECUTOR"
SLURM_EXECUTOR = "slurm"
END_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
}  # fmt: skip


class SlurmError(QtorchError, RuntimeError):
    """SLURM does not answer or refuses the request; the message is SLURM's."""


def current_job() -> dict[str, str] | None:
    """Return SLURM's record of the job that this process belongs to; None outside a job.

    Raises SlurmError if SLURM does not answer.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    return None if job_id is None else _show_job(job_id)


def query_job(job_id: str) -> dict[str, str]:
    """Return SLURM's record of a job, `12` or `12_3`; empty if SLURM no longer knows the job."""
    try:
        return _show_job(job_id)
    except SlurmError as error:
        if UNKNOWN_JOB.search(str(error)):
            return {}
        raise


def _show_job(job_id: str) -> dict[str, str]:
    return parse_job(run_scontrol("show", "job", "--oneliner", job_id), job_id)


def parse_job(text: str, job_id: str) -> dict[str, str]:
    """Parse the record of one job in the output of `scontrol show job --oneliner`.

    If `job_id` is the number of an array, the output lists all its tasks. One of them has this
    number as its own ID, and its record is returned; otherwise that of the first job.
    """
    records = []
    for line in text.splitlines():
        record: dict[str, str] = {}
        for key, value in re.findall(r"(\S+?)=(\S*)", line):
            # The job's command follows SLURM's fields and may contain KEY=VALUE words too.
            record.setdefault(key, value)
        records.append(record)
    return next((r for r in records if r.get("JobId") == job_id), records[0] if records else {})


def is_preempted(job: Mapping[str, str]) -> bool:
    """Whether a running job is in its grace time: SLURM is about to preempt it."""
    return job.get("JobState") == "RUNNING" and job.get("PreemptTime", "None") != "None"


def is_requeued_by_slurm(job: Mapping[str, str]) -> bool:
    """Whether SLURM itself restarts this process's job, so that nobody needs to requeue it.

    SLURM then has counted one more restart than at the start of this process.
    """
    return int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def has_ended(job: Mapping[str, str]) -> bool:
    """Whether a job will not run any more; so has a job that SLURM has forgotten."""
    return job.get("JobState", "COMPLETED") in END_STATES


def requeue(job: Mapping[str, str]) -> None:
    """Requeue a job; of an array, only this task. SLURM ends the job immediately."""
    job_id = f"{job['ArrayJobId']}_{job['ArrayTaskId']}" if "ArrayTaskId" in job else job["JobId"]
    run_scontrol("requeue", job_id)


def run_scontrol(*words: str) -> str:
    """Run scontrol and return its output."""
    try:
        process = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(str(error)) from error
    if process.returncode:
        raise SlurmError(process.stderr.strip() or process.stdout.strip())
    return process.stdout


# -- restarts of a job -----------------------------------------------------------------------------


def scheduler_job_name() -> str | None:
    """Return a job name that stays the same when the scheduler restarts the job; None without one.

    It is QTORCH_JOB if set (for example the name of a Kubernetes job), otherwise SLURM's job ID;
    each task of an array has its own.
    """
    job_name = os.environ.get(JOB_VARIABLE)
    if job_name:
        if not JOB_NAME_PATTERN.fullmatch(job_name):
            raise ConfigError(
                f"{JOB_VARIABLE}={job_name!r}: use only letters, digits and - _ . : / in "
                "a job name."
            )
        return job_name
    job_id = os.environ.get("SLURM_JOB_ID")
    return None if job_id is None else f"{os.environ.get('SLURM_CLUSTER_NAME', 'slurm')}.{job_id}"


def _is_restart() -> bool:
    """Whether this may be a restart; only SLURM counts them, so any start with QTORCH_JOB may."""
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
    job_id = os.environ.get("SLURM_JOB_ID")
    if not set(SCHEDULER_SIGNALS).intersection(received_signals):
        return None
    try:
        job = current_job()
        if job is None:
            return None
        if not is_requeued_by_slurm(job):
            if signal.SIGUSR1 not in received_signals and not is_preempted(job):
                return None
            requeue(job)
    except SlurmError as error:
        return f"cannot requeue SLURM job {job_id}: {error}"
    return f"requeued SLURM job {job_id}; it will resume this run."


# -- jobs of submitit ------------------------------------------------------------------------------


def set_submitit_signal() -> None:
    """Let submitit use the signal that a training treats as a stop request (instead of SIGUSR2)."""
    os.environ.setdefault(SIGNAL_VARIABLE, STOP_SIGNAL.name.removeprefix("SIG"))


def run_submitit_job(work: Callable[[], Any]) -> None:
    """Run a job in submitit's process; a stop signal reaches the job first, then submitit.

    Submitit's own handler ends the process in the middle of a step. Here the training receives the
    signal, stops after the current step and writes a checkpoint; then submitit requeues the job.
    After SIGTERM this happens only if SLURM preempts the job. If SLURM has requeued the job itself,
    the process ends without a result, because a result would tell the waiting launcher that the job
    is complete. `scancel` stops the job in the same way and does not requeue it.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    submitit_handler: Any = signal.getsignal(STOP_SIGNAL)
    StopSignals(interrupt_work, ignores_interrupts=True).install()
    try:
        work()
    except KeyboardInterrupt:
        if not received_signals:  # no scheduler stops the job: nothing to requeue
            return
        job = _submitit_job()
        if is_requeued_by_slurm(job):
            raise SystemExit(128 + signal.SIGTERM) from None
        if callable(submitit_handler) and (STOP_SIGNAL in received_signals or is_preempted(job)):
            submitit_handler(STOP_SIGNAL, None)


def _submitit_job() -> Mapping[str, str]:
    """Return SLURM's record of this job of submitit; empty outside SLURM or without an answer."""
    if os.environ.get(EXECUTOR_VARIABLE) != SLURM_EXECUTOR:
        return {}
    try:
        return current_job() or {}
    except SlurmError as error:
        log.warning("cannot ask SLURM why it stops this job: %s", error)
        return {}
