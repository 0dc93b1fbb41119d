"""Stop signals during a training: stop after the current step, save a checkpoint, and raise."""

from __future__ import annotations

import logging
import signal
from typing import Any

from qtorch.process.stops import (
    STOP_SIGNALS,
    StopRequest,
    StopSignals,
    received_signals,
    stop_name,
)

log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted; the message says at which step and how to resume.

    `checkpoint` is the path of the saved checkpoint, or None; `result` the training so far with its
    best weights (a FitResult), or None before the first validation.
    """

    def __init__(
        self, message: str, checkpoint: str | None = None, result: Any | None = None
    ) -> None:
        super().__init__(message)
        self.checkpoint, self.result = checkpoint, result


class StopTraining(BaseException):
    """Raised between two steps to leave Lightning's loops.

    It is not a KeyboardInterrupt, because Lightning would convert that to SystemExit and ignore any
    further Ctrl-C.
    """


class Interruption(StopRequest):
    """Context manager that turns a stop signal into a request to stop after the current step.

    A second Ctrl-C raises StopTraining at once, and a third one kills the process. In other threads
    than the main thread this changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._signals = StopSignals(self._stop, self._stop_immediately)

    def __enter__(self) -> Interruption:
        self._signals.install()
        if self._signals.is_installed and received_signals:  # its exception was swallowed
            self._stop(received_signals[0])
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.restore()

    def _stop(self, number: int) -> None:
        self.stop_requested = True
        log.warning(
            "received %s: stopping after this step; press Ctrl-C again to stop immediately",
            stop_name(number),
        )

    def _stop_immediately(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        raise StopTraining
