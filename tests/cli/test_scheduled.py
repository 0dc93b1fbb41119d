"""Whether a job that its scheduler stops goes back into the queue: by what SLURM says of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qtorch.cli import slurm, submitted
from qtorch.cli.scheduled import queued_again
from qtorch.core.stops import noted

# As SLURM 22.05 answers `scontrol show job --oneliner`, but for what nobody reads.
RECORD = (
    "JobId=12 {array}JobName=wrap UserId=me(1000) Priority=4294901759 JobState={state} Reason=None "
    "Requeue=1 Restarts={restarts} ExitCode=0:0 PreemptEligibleTime=2026-11-26T06:38:05 "
    "PreemptTime={preempted} Partition=all TRES=cpu=2,mem=2000M Command=run JobState=FAILED\n"
)


def record(state: str, preempted: str = "None", restarts: int = 0, array: str = "") -> str:
    return RECORD.format(state=state, preempted=preempted, restarts=restarts, array=array)


RUNNING = record("RUNNING")
PREEMPTED = record("RUNNING", "2026-11-26T06:38:09")
CANCELLED = record("COMPLETING")
CANCELLED_IN_GRACE = record("COMPLETING", "2026-11-26T06:38:09")
QUEUED_BY_SLURM = record("COMPLETING", restarts=1)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`scontrol(answer)`: a cluster that says this of its job; what it was asked to requeue."""
    asked = tmp_path / "requeued"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def answers(text: str) -> Path:
        (tmp_path / "answer").write_text(text)
        tool = tmp_path / "scontrol"
        tool.write_text(
            "#!/bin/sh\n"
            f"if [ $1 = requeue ]; then echo $2 >>{asked}; else cat {tmp_path}/answer; fi\n"
        )
        tool.chmod(0o755)
        return asked

    yield answers
    noted.clear()


@pytest.mark.parametrize(
    ("signals", "answer", "queued"),
    [
        ([signal.SIGUSR1], RUNNING, "12"),
        ([signal.SIGTERM, signal.SIGUSR1], RUNNING, "12"),
        ([signal.SIGTERM], PREEMPTED, "12"),
        ([signal.SIGTERM], QUEUED_BY_SLURM, ""),
        ([signal.SIGTERM], CANCELLED, None),
        ([signal.SIGTERM], CANCELLED_IN_GRACE, None),
        ([signal.SIGTERM], RUNNING, None),  # a user's own kill
        ([signal.SIGINT], PREEMPTED, None),
    ],
)
def test_a_job_of_sbatch(scontrol, signals, answer, queued):
    requeued = scontrol(answer)
    noted.answered = signals[0]
    noted.further.update(signals[1:])
    told = queued_again()
    assert (told is not None) == (queued is not None)
    assert (requeued.read_text().strip() if requeued.exists() else "") == (queued or "")
    if told is not None:
        assert told == "SLURM job 12 is queued again, and goes on in this run."


def test_of_an_array_its_own_task_alone(scontrol):
    other = record("RUNNING", array="ArrayJobId=12 ArrayTaskId=0 ").replace(
        "JobId=12 ", "JobId=13 ", 1
    )
    own = record("RUNNING", array="ArrayJobId=12 ArrayTaskId=3 ")
    requeued = scontrol(other + own)
    noted.asked = signal.SIGUSR1
    assert queued_again() is not None
    assert requeued.read_text().strip() == "12_3"


def test_slurm_that_does_not_answer(scontrol, tmp_path):
    scontrol(RUNNING)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Unable to contact slurm >&2\nexit 1\n")
    noted.asked = signal.SIGUSR1
    assert "could not be queued again: Unable to contact slurm" in str(queued_again())
    with pytest.raises(slurm.SlurmError):
        slurm.asked_of("12")
    for told in ("slurm_load_jobs error: Invalid job id specified", "Job 12_4 not found"):
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho {told} >&2\nexit 1\n")
        assert slurm.has_ended(slurm.asked_of("12"))


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"])
def test_what_may_still_run_has_not_ended(state):
    assert not slurm.has_ended(slurm.told(record(state), "12"))
    assert slurm.has_ended(slurm.told(record("CANCELLED"), "12_3"))


@pytest.mark.parametrize(
    ("signals", "answer", "again", "gone"),
    [
        ([signal.SIGUSR1], RUNNING, True, False),
        ([signal.SIGTERM, signal.SIGUSR1], RUNNING, True, False),
        ([signal.SIGTERM], PREEMPTED, True, False),
        ([signal.SIGTERM], QUEUED_BY_SLURM, False, True),
        ([signal.SIGTERM], CANCELLED, False, False),
    ],
)
def test_a_job_of_submitit(scontrol, monkeypatch, signals, answer, again, gone):
    requeued: list[int] = []
    scontrol(answer)
    monkeypatch.setenv(submitted.EXECUTOR_VARIABLE, submitted.SLURM)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    signal.signal(signal.SIGUSR1, lambda number, frame: requeued.append(number))

    def work() -> None:
        try:
            signal.raise_signal(signals[0])
        finally:  # a training that keeps its checkpoint
            for number in signals[1:]:
                signal.raise_signal(number)

    try:
        if gone:  # and no result, which would be the job's end
            with pytest.raises(SystemExit):
                submitted.do_as_submitted(work)
        else:
            submitted.do_as_submitted(work)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert requeued == [signal.SIGUSR1] * again


def test_submitit_is_told_which_signal_a_training_takes_as_a_notice(monkeypatch):
    monkeypatch.delenv(submitted.SIGNAL_VARIABLE, raising=False)
    submitted.choose_signal()
    assert os.environ[submitted.SIGNAL_VARIABLE] == "USR1"
    monkeypatch.setenv(submitted.SIGNAL_VARIABLE, "USR2")
    submitted.choose_signal()
    assert os.environ[submitted.SIGNAL_VARIABLE] == "USR2"  # the user's own
