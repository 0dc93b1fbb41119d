"""Query SLURM jobs (`scontrol show job`) and requeue them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

QUERY_TIMEOUT_SECONDS = 60.0
# SLURM has forgotten the job, or the job was cancelled before it started.
UNKNOWN_JOB = re.compile(r"Invalid job id|Job \S+ not found")
END_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
}  # fmt: skip


class SlurmError(Exception):
    """SLURM does not answer or refuses the request; the message is SLURM's."""


def current_job() -> dict[str, str] | None:
    """Return SLURM's record of the job that this process belongs to; None outside a job.

    Raises SlurmError if SLURM does not answer.
    """
    id = os.environ.get("SLURM_JOB_ID")
    return None if id is None else _show_job(id)


def query_job(job: str) -> dict[str, str]:
    """Return SLURM's record of a job, `12` or `12_3`; empty if SLURM no longer knows the job."""
    try:
        return _show_job(job)
    except SlurmError as error:
        if UNKNOWN_JOB.search(str(error)):
            return {}
        raise


def _show_job(job: str) -> dict[str, str]:
    return parse_job(run_scontrol("show", "job", "--oneliner", job), job)


def parse_job(text: str, job: str) -> dict[str, str]:
    """Parse the record of one job in the output of `scontrol show job --oneliner`.

    The first task of an array has the array's number, for which SLURM lists all tasks of the array.
    """
    records = []
    for line in text.splitlines():
        record: dict[str, str] = {}
        for key, value in re.findall(r"(\S+?)=(\S*)", line):
            # The job's command follows SLURM's fields and may contain KEY=VALUE words too.
            record.setdefault(key, value)
        records.append(record)
    return next((r for r in records if r.get("JobId") == job), records[0] if records else {})


def is_preempted(job: Mapping[str, str]) -> bool:
    """Whether a running job is in its grace time: SLURM is about to preempt it."""
    return job.get("JobState") == "RUNNING" and job.get("PreemptTime", "None") != "None"


def is_requeued_by_slurm(job: Mapping[str, str]) -> bool:
    """Whether SLURM itself restarts this process's job, so that nobody needs to requeue it."""
    return int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def has_ended(job: Mapping[str, str]) -> bool:
    """Whether a job will not run any more."""
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
