"""Ctrl-C or a scheduler's notice in the middle of a training: stop after the step, keep a
checkpoint, say how to go on."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from qtorch.core.stops import NOTICES, STOPS, noted

log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted; the message says where it stands and how to go on.

    `checkpoint` is the path of the checkpoint that was kept, or None.
    """

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopTraining(BaseException):
    """Raised between two steps to leave Lightning's loops.

    No KeyboardInterrupt: Lightning turns that one into SystemExit and ignores any further Ctrl-C.
    """


class Stoppable:
    """Something that a training is asked to stop by: `requested`."""

    def __init__(self) -> None:
        self.requested = False

    def is_requested(self) -> bool:
        """Whether the training is to stop."""
        return self.requested


class Interruption(Stoppable):
    """Inside the block the first signal of `STOPS` is only noted; a Ctrl-C after it ends at once,
    a further notice of a scheduler's does not: it may come twice.

    In another thread than the main one there are no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPS}
            if noted.asked is not None:  # and the exception was lost
                self._note(noted.asked, None)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in NOTICES:
            noted.further.add(number)
            return
        if self.requested:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)  # a third one needs nobody's consent
            raise StopTraining
        self.requested = True
        noted.answered = number
        name = signal.Signals(number).name
        log.warning("%s: stopping after this step; Ctrl-C once more ends at once.", name)
