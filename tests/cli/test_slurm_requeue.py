"""Tests of requeueing stopped jobs, depending on what SLURM reports about them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qtorch.cli.launchers import slurm
from qtorch.cli.launchers.slurm import requeue_slurm_job
from qtorch.process.stops import received_signals

# Answer of SLURM 22.05 to `scontrol show job --oneliner`, without fields that are not used.
RECORD = (
    "JobId=12 {array}JobName=wrap UserId=me(1000) Priority=4294901759 JobState={state} Reason=None "
    "Requeue=1 Restarts={restarts} ExitCode=0:0 PreemptEligibleTime=2026-11-26T06:38:05 "
    "PreemptTime={preempted} Partition=all TRES=cpu=2,mem=2000M Command=run JobState=FAILED\n"
)


def record(state: str, preempt_time: str = "None", restarts: int = 0, array: str = "") -> str:
    return RECORD.format(state=state, preempted=preempt_time, restarts=restarts, array=array)


RUNNING = record("RUNNING")
PREEMPTED = record("RUNNING", "2026-11-26T06:38:09")
CANCELLED = record("COMPLETING")
CANCELLED_IN_GRACE = record("COMPLETING", "2026-11-26T06:38:09")
QUEUED_BY_SLURM = record("COMPLETING", restarts=1)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return `scontrol(answer)`: install a fake scontrol, return the file of requeued jobs."""
    requeue_log = tmp_path / "requeued"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def install(text: str) -> Path:
        (tmp_path / "answer").write_text(text)
        script = tmp_path / "scontrol"
        script.write_text(
            "#!/bin/sh\n"
            f"if [ $1 = requeue ]; then echo $2 >>{requeue_log}; else cat {tmp_path}/answer; fi\n"
        )
        script.chmod(0o755)
        return requeue_log

    yield install
    received_signals.clear()


@pytest.mark.parametrize(
    ("signals", "answer", "requeued_id"),
    [
        ([signal.SIGUSR1], RUNNING, "12"),
        ([signal.SIGTERM, signal.SIGUSR1], RUNNING, "12"),
        ([signal.SIGTERM], PREEMPTED, "12"),
        ([signal.SIGTERM], QUEUED_BY_SLURM, ""),
        ([signal.SIGTERM], CANCELLED, None),
        ([signal.SIGTERM], CANCELLED_IN_GRACE, None),
        ([signal.SIGTERM], RUNNING, None),  # a kill by the user
        ([signal.SIGINT], PREEMPTED, None),
    ],
)
def test_sbatch_job_is_requeued(scontrol, signals, answer, requeued_id):
    requeue_log = scontrol(answer)
    received_signals.extend(signals)
    message = requeue_slurm_job()
    assert (message is not None) == (requeued_id is not None)
    assert (requeue_log.read_text().strip() if requeue_log.exists() else "") == (requeued_id or "")
    if message is not None:
        assert message == "requeued SLURM job 12; it will resume this run."


def test_array_task_requeues_only_itself(scontrol):
    other_task = record("RUNNING", array="ArrayJobId=12 ArrayTaskId=0 ").replace(
        "JobId=12 ", "JobId=13 ", 1
    )
    own_task = record("RUNNING", array="ArrayJobId=12 ArrayTaskId=3 ")
    requeue_log = scontrol(other_task + own_task)
    received_signals.append(signal.SIGUSR1)
    assert requeue_slurm_job() is not None
    assert requeue_log.read_text().strip() == "12_3"


def test_slurm_errors(scontrol, tmp_path):
    scontrol(RUNNING)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Unable to contact slurm >&2\nexit 1\n")
    received_signals.append(signal.SIGUSR1)
    assert "cannot requeue SLURM job 12: Unable to contact slurm" in str(requeue_slurm_job())
    with pytest.raises(slurm.SlurmError):
        slurm.query_job("12")
    for message in ("slurm_load_jobs error: Invalid job id specified", "Job 12_4 not found"):
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {message} >&2\nexit 1\n")
        assert slurm.has_ended(slurm.query_job("12"))


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"])
def test_pending_and_running_jobs_have_not_ended(state):
    assert not slurm.has_ended(slurm.parse_job(record(state), "12"))
    assert slurm.has_ended(slurm.parse_job(record("CANCELLED"), "12_3"))


@pytest.mark.parametrize(
    ("signals", "answer", "is_requeued", "has_exited"),
    [
        ([signal.SIGUSR1], RUNNING, True, False),
        ([signal.SIGTERM, signal.SIGUSR1], RUNNING, True, False),
        ([signal.SIGTERM], PREEMPTED, True, False),
        ([signal.SIGTERM], QUEUED_BY_SLURM, False, True),
        ([signal.SIGTERM], CANCELLED, False, False),
    ],
)
def test_submitit_job_is_requeued(scontrol, monkeypatch, signals, answer, is_requeued, has_exited):
    requeue_signals: list[int] = []
    scontrol(answer)
    monkeypatch.setenv(slurm.EXECUTOR_VARIABLE, slurm.SLURM_EXECUTOR)
    previous_handlers = {
        n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    signal.signal(signal.SIGUSR1, lambda number, frame: requeue_signals.append(number))

    def work() -> None:
        try:
            signal.raise_signal(signals[0])
        finally:  # a training that writes its checkpoint
            for number in signals[1:]:
                signal.raise_signal(number)

    try:
        if has_exited:  # and leaves no result, which would complete the job
            with pytest.raises(SystemExit):
                slurm.run_submitit_job(work)
        else:
            slurm.run_submitit_job(work)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    assert requeue_signals == [signal.SIGUSR1] * is_requeued


def test_submitit_signal_can_be_set_by_the_user(monkeypatch):
    monkeypatch.delenv(slurm.SIGNAL_VARIABLE, raising=False)
    slurm.set_submitit_signal()
    assert os.environ[slurm.SIGNAL_VARIABLE] == "USR1"
    monkeypatch.setenv(slurm.SIGNAL_VARIABLE, "USR2")
    slurm.set_submitit_signal()
    assert os.environ[slurm.SIGNAL_VARIABLE] == "USR2"  # set by the user
