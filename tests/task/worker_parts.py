"""What the worker's tests have its children do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pool_workers import note

from qtorch.core.heartbeat import RUN, beat


def act(definition: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Do what the definition says; each attempt leaves a line with its number and process."""
    note(definition["journal"], f"{definition['number']} {os.getpid()} {os.getppid()}")
    how = definition["how"]
    if how == "raise":
        raise ValueError("this task\nfails")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        raise SystemExit(3)
    if how == "hang":
        threading.Event().wait()
    if how == "long":
        _work_long(definition, run)
    return {
        "number": definition["number"],
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "run": None if run is None else run["recorder_id"],
    }


def _work_long(definition: Mapping[str, Any], run: Mapping[str, Any] | None) -> None:
    """Work with signs of life until told to go on, or interrupted; keep a checkpoint then."""
    beat(RUN, experiment_id="1", recorder_id=f"run{definition['number']}", tracking_uri=None)
    go = Path(definition["go"])
    step = 0
    try:
        while not go.exists():
            step += 1
            beat("training", epoch=step, epochs=None, metrics={"valid/ic": 0.5})
            time.sleep(0.05)
    except KeyboardInterrupt:
        note(definition["journal"], f"checkpoint {os.getpid()}")
        raise
