"""Stop signals: shut a process down in an orderly way, so that trainings keep a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType

# A scheduler (SLURM's `--signal` and `scancel`, Kubernetes, Ray) sends these before it ends the
# process. They may arrive several times; repeated signals mean the same as the first.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Ctrl-C in a terminal requests the same; a second Ctrl-C ends the process immediately.
STOP_SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)


@dataclass
class StopState:
    """The stop signals that this process has received; commands and workers clear it at start.

    interrupt_signal: the signal for which the process's own handler interrupted the work. The
        exception that a handler raises is lost if it arrives in a destructor; work that continues
        nevertheless can check this attribute.
    training_signal: the signal that a running training handles. A training replaces the process's
        handlers; it writes a checkpoint and raises its own error, so nothing else must interrupt
        it.
    later_signals: scheduler signals that arrived while the training did so.
    """

    interrupt_signal: int | None = None
    training_signal: int | None = None
    later_signals: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Forget all signals."""
        self.interrupt_signal = self.training_signal = None
        self.later_signals.clear()


stop_state = StopState()


class StopHandler:
    """Interrupts the work of a child process once, however many scheduler signals arrive.

    A scheduler signals every process of a job, and the supervisor forwards the signal to its child
    as well. A training would treat the duplicate as a second signal and end without a checkpoint.
    Python writes each signal to the wakeup pipe, whichever handler is installed.
    """

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
        self._has_interrupted = False
        self.received_signals: list[int] = []  # the signals in order, updated by `count_signals`
        self._lock = threading.Lock()

    def count_signals(self) -> int:
        """Return how many scheduler signals have arrived."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                self.received_signals += [
                    n for n in os.read(self._read, 4096) if n in SCHEDULER_SIGNALS
                ]
            return len(self.received_signals)

    def interrupt(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Interrupt the main thread, unless it was interrupted before."""
        main = threading.main_thread().ident
        if self.count_signals() == 0 and not self._has_interrupted and main is not None:
            # The wakeup pipe gets the signal only when the main thread runs again.
            self._has_interrupted = True
            signal.pthread_kill(main, number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if stop_state.interrupt_signal is None and stop_state.training_signal is None:
            stop_state.interrupt_signal = number
            raise KeyboardInterrupt("received a stop signal")
