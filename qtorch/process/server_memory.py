"""The first module that a fork server imports: it keeps garbage collections away from all others.

They would slow the imports down. In the children they would look through everything that was
imported, and so copy the memory pages that a child shares with the server.
"""

from __future__ import annotations

import gc
import os

_is_server = True


def _freeze_imports() -> None:
    if _is_server:
        gc.freeze()


def _collect_garbage() -> None:
    global _is_server
    if _is_server:  # not where a child forks a process of its own
        _is_server = False
        gc.enable()


gc.disable()
os.register_at_fork(before=_freeze_imports, after_in_child=_collect_garbage)
