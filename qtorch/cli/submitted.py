"""Run a job under submitit, which starts, signals and requeues it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from qtorch.cli.slurm import SlurmError, current_job, is_preempted, is_requeued_by_slurm

log = logging.getLogger(__name__)

SUBMITIT = "Submitit"  # part of the names of the launcher classes
SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
STOP_SIGNAL = signal.SIGUSR1
EXECUTOR_VARIABLE, SLURM = "SUBMITIT_EXECUTOR", "slurm"


def is_submitit(launcher: str) -> bool:
    """Whether the launcher's jobs continue after the process that launched them has ended."""
    return SUBMITIT in launcher


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
    from qtorch.core.stops import StopHandler

    if threading.current_thread() is not threading.main_thread():
        work()
        return
    submitit_handler: Any = signal.getsignal(STOP_SIGNAL)
    stops = StopHandler()
    try:
        work()
    except KeyboardInterrupt:
        if not stops.count_signals():
            return
        job = _slurm_record()
        if is_requeued_by_slurm(job):
            raise SystemExit(128 + signal.SIGTERM) from None
        if callable(submitit_handler) and (
            STOP_SIGNAL in stops.received_signals or is_preempted(job)
        ):
            submitit_handler(STOP_SIGNAL, None)


def _slurm_record() -> Mapping[str, str]:
    """Return SLURM's record of this job; empty if it is not a SLURM job."""
    if os.environ.get(EXECUTOR_VARIABLE) != SLURM:
        return {}
    try:
        return current_job() or {}
    except SlurmError as error:
        log.warning("cannot ask SLURM why it stops this job: %s", error)
        return {}
