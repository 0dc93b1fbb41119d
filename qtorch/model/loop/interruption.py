"""Stop signals during a training: stop after the current step, save a checkpoint, and raise.

Does not import torch: the light start of a rank's process imports it.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from qtorch.process.stops import SCHEDULER_SIGNALS, STOP_SIGNALS, stop_state

log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted; the message says at which step and how to resume.

    `checkpoint` is the path of the saved checkpoint, or None.
    """

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopTraining(BaseException):
    """Raised between two steps to leave Lightning's loops.

    It is not a KeyboardInterrupt, because Lightning would convert that to SystemExit and ignore any
    further Ctrl-C.
    """


class StopRequest:
    """A flag that asks a training to stop."""

    def __init__(self) -> None:
        self.stop_requested = False

    def is_requested(self) -> bool:
        """Whether the training should stop."""
        return self.stop_requested


class Interruption(StopRequest):
    """Context manager that turns a stop signal into a request to stop after the current step.

    A second Ctrl-C raises StopTraining at once. Further signals of a scheduler do not, since
    schedulers may send them twice. Signals can only be handled in the main thread; in other threads
    this changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS
            }
            if stop_state.interrupt_signal is not None:  # its exception was swallowed
                self._handle_signal(stop_state.interrupt_signal, None)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested and number in SCHEDULER_SIGNALS:
            stop_state.later_signals.add(number)
            return
        if self.stop_requested:
            for stop_number in self._previous_handlers:
                signal.signal(stop_number, signal.SIG_DFL)  # a third Ctrl-C kills the process
            raise StopTraining
        self.stop_requested = True
        stop_state.training_signal = number
        name = signal.Signals(number).name
        log.warning(
            "received %s: stopping after this step; press Ctrl-C again to stop immediately", name
        )
