"""The one hook through which library code finds the run that it belongs to.

`R.start`, `Recorder.start_run` and with them `task_train` make a recorder current. Code that
takes `recorder=None` asks `current_recorder()`. A recorder is current in the context (thread,
asyncio task) that started it; a context that never started one sees the newest of the process,
so that worker threads and the cells of a notebook find it too.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder

_lock = threading.Lock()
_running: list[Recorder] = []
_here: ContextVar[tuple[Recorder, ...] | None] = ContextVar("qtorch_recorders", default=None)


def current_recorder() -> Recorder | None:
    """The innermost running recorder of this context, or None."""
    own = running_here()
    return own[-1] if own else None


def running_here() -> list[Recorder]:
    """The running recorders that this context sees, the innermost last."""
    with _lock:
        mine = _here.get()
        if mine is None:
            return list(_running)
        return [r for r in mine if any(r is other for other in _running)]


def make_current(recorder: Recorder) -> None:
    """Called when a recorder starts to run."""
    with _lock:
        if not any(recorder is other for other in _running):
            _running.append(recorder)
    mine = tuple(r for r in _here.get() or () if r is not recorder)
    _here.set((*mine, recorder))


def make_past(recorder: Recorder) -> None:
    """Called when a recorder has ended."""
    with _lock:
        _running[:] = [r for r in _running if r is not recorder]
    mine = _here.get()
    if mine is not None:
        _here.set(tuple(r for r in mine if r is not recorder))


def all_running() -> list[Recorder]:
    """Every running recorder of the process, whichever context started it."""
    with _lock:
        return list(_running)
