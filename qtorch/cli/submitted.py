"""A job in the hands of a scheduler: submitit starts it, signals it, queues it again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

SUBMITIT = "Submitit"  # in the name of a launcher's class
SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
NOTICE = signal.SIGUSR1


def submitted(launcher: str) -> bool:
    """Whether jobs live on without the process that launched them."""
    return SUBMITIT in launcher


def choose_signal() -> None:
    """Have submitit ask for the signal that a training takes as a notice (its own is SIGUSR2)."""
    os.environ.setdefault(SIGNAL_VARIABLE, NOTICE.name.removeprefix("SIG"))


def do_as_submitted(work: Callable[[], Any]) -> None:
    """Do a job's work in submitit's process; a notice reaches the work first, submitit then.

    Submitit's own handler ends the process in the middle of a step. Here the training notes the
    signal, stops after its step and keeps a checkpoint; then submitit queues the job again. A
    SIGTERM (`scancel`) stops the work alike, and that is all.
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
        if stops.told() and stops.first == NOTICE and callable(again):
            again(NOTICE, None)
