"""What SLURM says of a job (`scontrol show job`), and a job's way back into its queue."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

ASK_SECONDS = 60.0
UNKNOWN_JOB = re.compile(r"Invalid job id|Job \S+ not found")  # or cancelled before it began
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
}  # fmt: skip


class SlurmError(Exception):
    """SLURM does not answer, or refuses; the message is its own."""


def own_job() -> dict[str, str] | None:
    """What SLURM says of the job that this process belongs to; None outside one.

    Raises SlurmError where it says nothing.
    """
    id = os.environ.get("SLURM_JOB_ID")
    return None if id is None else _shown(id)


def asked_of(job: str) -> dict[str, str]:
    """SLURM's words on a job, `12` or `12_3`; none where it does not know the job any more."""
    try:
        return _shown(job)
    except SlurmError as error:
        if UNKNOWN_JOB.search(str(error)):
            return {}
        raise


def _shown(job: str) -> dict[str, str]:
    return told(scontrol("show", "job", "--oneliner", job), job)


def told(text: str, job: str) -> dict[str, str]:
    """The record of one job in `scontrol show job --oneliner`.

    An array's first task has the array's number, under which SLURM shows all of them.
    """
    records = []
    for line in text.splitlines():
        record: dict[str, str] = {}
        for key, value in re.findall(r"(\S+?)=(\S*)", line):
            record.setdefault(key, value)  # a command's own words stand behind SLURM's
        records.append(record)
    return next((r for r in records if r.get("JobId") == job), records[0] if records else {})


def is_preempted(job: Mapping[str, str]) -> bool:
    """Whether a running job is in its grace time: SLURM takes its node away, but does not yet."""
    return job.get("JobState") == "RUNNING" and job.get("PreemptTime", "None") != "None"


def is_queued_by_slurm(job: Mapping[str, str]) -> bool:
    """Whether SLURM ends this process's job to start it again, which nobody needs to ask for."""
    return int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def has_ended(job: Mapping[str, str]) -> bool:
    """Whether a job will not run any more."""
    return job.get("JobState", "COMPLETED") in ENDED


def requeue(job: Mapping[str, str]) -> None:
    """Put a job back into the queue; of an array this task alone. SLURM ends the job at once."""
    own = f"{job['ArrayJobId']}_{job['ArrayTaskId']}" if "ArrayTaskId" in job else job["JobId"]
    scontrol("requeue", own)


def scontrol(*words: str) -> str:
    """What the command prints."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(str(error)) from error
    if done.returncode:
        raise SlurmError(done.stderr.strip() or done.stdout.strip())
    return done.stdout
