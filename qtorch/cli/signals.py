"""Ctrl-C and a scheduler's SIGTERM while a command works."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qtorch.cli.guard import INTERRUPTED

TERMINATED = 128 + signal.SIGTERM


@contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C stops the work in order, the second ends the process at once.

    SIGTERM (a scheduler's notice) stops in order too. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = 0

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            print("interrupted twice: ending at once.", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def on_terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    handlers = {signal.SIGINT: on_interrupt, signal.SIGTERM: on_terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
