"""Ctrl-C and a scheduler's notice while a command works."""

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
from qtorch.core.stops import NOTICES


@contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C stops the work in order, the second ends the process at once.

    A scheduler's notice (SIGTERM, SIGUSR1) stops in order too. Outside the main thread nothing
    changes.
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

    def on_notice(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers: dict[int, Any] = dict.fromkeys(NOTICES, on_notice)
    handlers[signal.SIGINT] = on_interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
