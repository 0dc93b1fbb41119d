"""How a launcher reaches a job's process: its modules are imported without garbage collections.

submitit pickles what a job calls, so the launcher's modules are imported while it is unpickled.
This module itself imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from qtorch.core.lazy import quick_imports


class QuickStart:
    """Calls a launcher; unpickling it is a block of `quick_imports`."""

    def __init__(self, launcher: Callable[..., Any] | None = None) -> None:
        self._launcher = launcher
        self._imports = ExitStack()

    def __call__(self, *args: Any) -> Any:
        assert self._launcher is not None
        return self._launcher(*args)

    def __reduce__(self) -> tuple[Callable[[], QuickStart], tuple[()], Any]:
        return _begin_imports, (), self._launcher

    def __setstate__(self, launcher: Callable[..., Any]) -> None:
        self._launcher = launcher
        self._imports.close()


def _begin_imports() -> QuickStart:
    """Return an object whose state is unpickled next."""
    start = QuickStart()
    start._imports.enter_context(quick_imports(freeze=True))
    return start
