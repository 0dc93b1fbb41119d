"""A job in the hands of a scheduler: submitit starts it, signals it, queues it again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from qtorch.cli.slurm import SlurmError, is_preempted, is_queued_by_slurm, own_job

log = logging.getLogger(__name__)

SUBMITIT = "Submitit"  # in the name of a launcher's class
SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
NOTICE = signal.SIGUSR1
EXECUTOR_VARIABLE, SLURM = "SUBMITIT_EXECUTOR", "slurm"


def submitted(launcher: str) -> bool:
    """Whether jobs live on without the process that launched them."""
    return SUBMITIT in launcher


def choose_signal() -> None:
    """Have submitit ask for the signal that a training takes as a notice (its own is SIGUSR2)."""
    os.environ.setdefault(SIGNAL_VARIABLE, NOTICE.name.removeprefix("SIG"))


def do_as_submitted(work: Callable[[], Any]) -> None:
    """Do a job's work in submitit's process; a notice reaches the work first, submitit then.

    Submitit's own handler ends the process in the middle of a step. Here the training notes the
    signal, stops after its step and keeps a checkpoint; then submitit queues the job again. After
    a SIGTERM it does so if SLURM takes the node away for another job; where SLURM has queued the
    job itself, the process ends without a result, which would be the job's end for who waits for
    it. `scancel` stops the work alike, and that is all.
    """
    from qtorch.core.stops import Stops

    if threading.current_thread() is not threading.main_thread():
        work()
        return
    again: Any = signal.getsignal(NOTICE)
    stops = Stops()
    try:
        work()
    except KeyboardInterrupt:
        if not stops.told():
            return
        job = _of_slurm()
        if is_queued_by_slurm(job):
            raise SystemExit(128 + signal.SIGTERM) from None
        if callable(again) and (NOTICE in stops.heard or is_preempted(job)):
            again(NOTICE, None)


def _of_slurm() -> Mapping[str, str]:
    """What SLURM says of this job; nothing where it is none of SLURM's."""
    if os.environ.get(EXECUTOR_VARIABLE) != SLURM:
        return {}
    try:
        return own_job() or {}
    except SlurmError as error:
        log.warning("SLURM does not say why it stops this job: %s", error)
        return {}
