"""Training functions of a pool's tests that worker processes import."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtorch.tracking import Recorder
from qtorch.trainer import task_train

MARK = "trained"


def train_then_wait(task: Mapping[str, Any], experiment_name: str, **options: Any) -> Recorder:
    """Train, and the first time never come back: what is killed then has not committed."""
    recorder = task_train(task, experiment_name, **options)
    if not Path(MARK).exists():
        Path(MARK).touch()
        threading.Event().wait()
    return recorder
