"""The signals that ask a process to stop in order, keeping what it has."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType

# A scheduler's notice that the process will be ended soon: SLURM's `--signal` and `scancel`,
# Kubernetes, Ray. It comes once or several times, and means the same however often it comes.
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C asks for the same; the second one is meant: end at once.
STOPS = (signal.SIGINT, *NOTICES)


@dataclass
class Noted:
    """What became of the stops of this process; a command or a worker begins with none.

    `asked`: the signal on which the process's own handler has interrupted the work. An exception
    that a handler raises may come into a destructor, which loses it: work that goes on
    nevertheless finds here that it should not. `answered`: the signal that a training, which
    stands in for those handlers, answers by a checkpoint and an error of its own: nothing needs
    to be interrupted again. `further`: notices that came while it did so.
    """

    asked: int | None = None
    answered: int | None = None
    further: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Begin anew."""
        self.asked = self.answered = None
        self.further.clear()


noted = Noted()


class Stops:
    """A scheduler's notice, however often and by whom it is sent, interrupts the work once.

    A scheduler signals every process of a job and the supervisor tells its child too; what a
    training takes as a second signal would end it without a checkpoint. Python notes each signal
    in the wakeup pipe, whoever handles it.
    """

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in NOTICES:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
        self._asked = False
        self.heard: list[int] = []  # which, in their order, once `told` has looked
        self._lock = threading.Lock()

    def told(self) -> int:
        """How many of them came."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                self.heard += [n for n in os.read(self._read, 4096) if n in NOTICES]
            return len(self.heard)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Interrupt the main thread, unless it has been already."""
        main = threading.main_thread().ident
        if self.told() == 0 and not self._asked and main is not None:
            self._asked = True  # the signal is noted when the main thread comes to it
            signal.pthread_kill(main, number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if noted.asked is None and noted.answered is None:
            noted.asked = number
            raise KeyboardInterrupt("asked to stop")
