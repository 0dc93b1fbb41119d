"""Heartbeats: long-running work reports its progress to listeners.

Training loops and other slow steps call `beat`; the process that renews a task's lease listens.
Without a listener a beat costs one comparison, so that it may be called inside a loop over
batches. A beat must not synchronize with a device: it reports only what the host already knows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

RUN = "run"  # the stage that announces a task's run; it is never delayed
PAUSE_SECONDS = 0.5

_listeners: tuple[Listener, ...] = ()
_lock = threading.Lock()
_next_report = 0.0
_pending_details: dict[str, Any] = {}


def beat(stage: str, **details: Any) -> None:
    """Report that the work is alive, its current stage and further details.

    Listeners get at most two beats per second; the details of skipped beats are merged into the
    next one. `beat("run", experiment_id=..., recorder_id=...)` is reported immediately. An
    exception raised by a listener propagates and stops the work.
    """
    if _listeners:
        _notify_listeners(stage, details)


def has_listeners() -> bool:
    """Whether anybody listens; if not, skip computing expensive details."""
    return bool(_listeners)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, details)` for every beat of this process inside the block.

    The listener runs in the thread that beats and should return quickly.
    """
    global _listeners, _next_report
    with _lock:
        _listeners = (*_listeners, listener)
        _next_report = 0.0
        _pending_details.clear()
    try:
        yield
    finally:
        with _lock:
            _listeners = tuple(each for each in _listeners if each is not listener)


def _notify_listeners(stage: str, details: dict[str, Any]) -> None:
    global _next_report
    with _lock:
        now = time.monotonic()
        if stage == RUN:
            report = details
        elif now < _next_report:
            _pending_details.update(details)
            return
        else:
            report = {**_pending_details, **details}
            _pending_details.clear()
            _next_report = now + PAUSE_SECONDS
        listeners = _listeners
    for listener in listeners:
        listener(stage, report)
