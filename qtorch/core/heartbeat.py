"""Signs of life: what a long piece of work is at, told to whoever listens.

Whoever keeps a task's lease listens; loops and slow parts beat. What happens without a listener
is one comparison, so that a beat may stand inside a loop over batches. A beat never waits for a
device: it carries what the host knows anyway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

RUN = "run"  # the stage that announces a task's run: told at once, always
PAUSE_SECONDS = 0.5

_listeners: tuple[Listener, ...] = ()
_lock = threading.Lock()
_next = 0.0
_kept: dict[str, Any] = {}


def beat(stage: str, **details: Any) -> None:
    """Say that the work goes on, what it is at, and what is known of it.

    At most two beats a second are told; the details of the others go along with the next one.
    `beat("run", experiment_id=..., recorder_id=...)` is told at once. An error that a listener
    raises stops the work.
    """
    if _listeners:
        _tell(stage, details)


def is_heard() -> bool:
    """Whether anybody listens: details that cost something need not be made otherwise."""
    return bool(_listeners)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, details)` for beats of the whole process inside the block.

    It is called in the thread that beats, and should return quickly.
    """
    global _listeners, _next
    with _lock:
        _listeners = (*_listeners, listener)
        _next = 0.0
        _kept.clear()
    try:
        yield
    finally:
        with _lock:
            _listeners = tuple(each for each in _listeners if each is not listener)


def _tell(stage: str, details: dict[str, Any]) -> None:
    global _next
    with _lock:
        now = time.monotonic()
        if stage == RUN:
            told = details
        elif now < _next:
            _kept.update(details)
            return
        else:
            told = {**_kept, **details}
            _kept.clear()
            _next = now + PAUSE_SECONDS
        listeners = _listeners
    for listener in listeners:
        listener(stage, told)
