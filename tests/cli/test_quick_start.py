"""Tests of QuickStart: what it calls is unpickled without garbage collections."""

from __future__ import annotations

import gc
import pickle
from typing import Any

from qtorch.cli.launchers.quick_start import QuickStart

gc_states: list[bool] = []


class Launcher:
    def __call__(self, *args: int) -> int:
        gc_states.append(gc.isenabled())
        return sum(args)

    def __setstate__(self, state: Any) -> None:
        gc_states.append(gc.isenabled())

    def __getstate__(self) -> dict[str, Any]:
        return {"number": 1}


def test_launcher_is_unpickled_without_garbage_collections() -> None:
    content = pickle.dumps(QuickStart(Launcher()))
    gc_states.clear()
    start = pickle.loads(content)
    assert start(1, 2) == 3
    assert gc_states == [False, True]
