"""Training functions for pool tests, which worker processes import."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtorch.tracking import Recorder
from qtorch.trainer import task_train

MARKER_FILE = "trained"


def train_then_wait(task: Mapping[str, Any], experiment_name: str, **options: Any) -> Recorder:
    """Train the task; the first time, hang afterwards, so that a kill comes before the commit."""
    recorder = task_train(task, experiment_name, **options)
    if not Path(MARKER_FILE).exists():
        Path(MARKER_FILE).touch()
        threading.Event().wait()
    return recorder
