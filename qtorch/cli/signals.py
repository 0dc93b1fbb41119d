"""Handle Ctrl-C and stop signals from a scheduler while a command runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qtorch.cli.guard import INTERRUPTED
from qtorch.core.stops import SCHEDULER_SIGNALS, stop_state


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Stop the work in an orderly way on the first Ctrl-C, and immediately on the second.

    A scheduler's signals (SIGTERM, SIGUSR1) stop it in an orderly way too. Outside the main thread
    this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop_state.clear()
    num_interrupts = 0

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        if num_interrupts > 1:
            print("interrupted twice: exiting immediately.", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        stop_state.interrupt_signal = number
        raise KeyboardInterrupt

    def on_scheduler_signal(number: int, frame: FrameType | None) -> None:
        stop_state.interrupt_signal = number
        raise SystemExit(128 + number)

    handlers: dict[int, Any] = dict.fromkeys(SCHEDULER_SIGNALS, on_scheduler_signal)
    handlers[signal.SIGINT] = on_interrupt
    previous_handlers = {
        number: signal.signal(number, handler) for number, handler in handlers.items()
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
