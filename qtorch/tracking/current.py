"""The current recorder: how library code finds the run that it belongs to.

`R.start` and `Recorder.start_run` (and so `task_train`) make a recorder current. Code with an
argument `recorder=None` falls back to `current_recorder()`. A recorder is current in the context
(thread or asyncio task) that started it. A context that never started a recorder sees the newest
one of the process, so that worker threads and notebook cells find it too.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

_lock = threading.Lock()
_running: list[Recorder] = []
_context_recorders: ContextVar[tuple[Recorder, ...] | None] = ContextVar(
    "qtorch_recorders", default=None
)


def current_recorder() -> Recorder | None:
    """Return the innermost running recorder of this context, or None."""
    recorders = visible_recorders()
    return recorders[-1] if recorders else None


def visible_recorders() -> list[Recorder]:
    """Return the running recorders that this context sees, the innermost last."""
    with _lock:
        own = _context_recorders.get()
        if own is None:
            return list(_running)
        return [r for r in own if any(r is running for running in _running)]


def add_running(recorder: Recorder) -> None:
    """Make a recorder that starts to run current."""
    with _lock:
        if not any(recorder is running for running in _running):
            _running.append(recorder)
    own = tuple(r for r in _context_recorders.get() or () if r is not recorder)
    _context_recorders.set((*own, recorder))


def remove_running(recorder: Recorder) -> None:
    """Remove a recorder that has ended."""
    with _lock:
        _running[:] = [r for r in _running if r is not recorder]
    own = _context_recorders.get()
    if own is not None:
        _context_recorders.set(tuple(r for r in own if r is not recorder))


def running_recorders() -> list[Recorder]:
    """Return every running recorder of the process, whichever context started it."""
    with _lock:
        return list(_running)
