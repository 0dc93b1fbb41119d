"""The model of stop signals, for every process: commands, workers, trainings, child processes.

The first signal asks for an orderly end, in which trainings write a checkpoint. A scheduler may
send several signals, to every process of a job, so further signals of a scheduler mean the same as
the first. A further Ctrl-C asks to end immediately.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

# A scheduler (SLURM's `--signal` and `scancel`, Kubernetes, Ray) sends these before it ends the
# process.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)

# The stop signals that were received since the outermost `StopSignals` was installed. An exception
# that a handler raises is lost if it arrives in a destructor: work that continues nevertheless can
# look here.
received_signals: list[int] = []

# The signal for which this process's parent has asked it to stop; 0 if the parent received none.
_parent_signals: list[int] = []


class StopSignals:
    """Handles the stop signals of this process until `restore`, or inside a `with` block.

    `on_stop(number)` is called for the first stop signal, `on_second_interrupt()` for a later
    Ctrl-C. Both may raise. `ignores_interrupts`: Ctrl-C is ignored, because the parent process gets
    and handles it. Only the main thread can handle signals; in other threads nothing is changed.
    """

    def __init__(
        self,
        on_stop: Callable[[int], None],
        on_second_interrupt: Callable[[], None] = lambda: None,
        *,
        ignores_interrupts: bool = False,
    ) -> None:
        self.on_stop, self.on_second_interrupt = on_stop, on_second_interrupt
        self._ignores_interrupts = ignores_interrupts
        self._previous_handlers: dict[int, Any] = {}

    @property
    def is_installed(self) -> bool:
        """Whether this object handles the signals."""
        return bool(self._previous_handlers)

    def install(self) -> None:
        """Handle the stop signals from now on."""
        if threading.current_thread() is threading.main_thread():
            if not any(map(_is_handled, STOP_SIGNALS)):
                received_signals.clear()
            for number in STOP_SIGNALS:
                is_ignored = self._ignores_interrupts and number == signal.SIGINT
                handler = signal.SIG_IGN if is_ignored else self.handle
                self._previous_handlers[number] = signal.signal(number, handler)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle one signal."""
        is_first = not received_signals
        received_signals.append(number)
        if is_first:
            self.on_stop(number)
        elif number == signal.SIGINT:
            self.on_second_interrupt()


def _is_handled(number: int) -> bool:
    return isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignals)


class StopRequest:
    """A flag that asks a training to stop after its current step."""

    def __init__(self) -> None:
        self.stop_requested = False

    def is_requested(self) -> bool:
        """Whether the training should stop."""
        return self.stop_requested


def ignore_stop_signals() -> None:
    """Ignore the stop signals, because another process gets them too and handles them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_work(number: int) -> None:
    """Raise KeyboardInterrupt: the `on_stop` of processes whose work can be interrupted."""
    raise KeyboardInterrupt("received a stop signal")


def stop_name(number: int) -> str:
    """Name for a user what has stopped this process, whose handler was called with a signal."""
    if _parent_signals == [0]:
        return "the command's request to stop"
    number = _parent_signals[0] if _parent_signals else number
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def send_stop_signal(signal_of_parent: int = 0) -> None:
    """Stop the main thread from another thread, unless this process was stopped before.

    `signal_of_parent`: the signal for which the parent asks this process to stop; 0: none.
    """
    main = threading.main_thread().ident
    if not received_signals and main is not None:
        _parent_signals[:] = [signal_of_parent]
        signal.pthread_kill(main, signal.SIGTERM)


class CommandLock:
    """Tells the processes that work for a command whether it still wants their work.

    The command holds a lock on a file. It releases the lock to stop the work, and the system does
    so if the command is killed. Only processes on the same machine notice.
    """

    def __init__(self) -> None:
        self._descriptor, name = tempfile.mkstemp(prefix="qtorch-command-")
        self.path = Path(name)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.is_released = False

    def release(self) -> None:
        """Stop the work."""
        self.is_released = True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Remove the file, after the work has ended."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)


def is_command_stopped(path: str | Path | None) -> bool:
    """Whether the command with this lock file has stopped its work, or was killed.

    Without a file the work is not stopped: there is no command (None), it runs on another machine,
    or it has removed the file because its work has ended.
    """
    if path is None:
        return False
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # locked by the command, or there is no such file
        return False
    return True
