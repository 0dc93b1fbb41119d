"""The function that the tests of `qtorch worker` run in its children."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pool_workers import append_line

from qtorch.process.heartbeat import RUN, beat


def act(definition: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Behave as the definition says; write number and process ids to the journal first."""
    append_line(definition["journal"], f"{definition['number']} {os.getpid()} {os.getppid()}")
    behavior = definition["behavior"]
    if behavior == "raise":
        raise ValueError("this task\nfails")
    if behavior == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if behavior == "exit":
        raise SystemExit(3)
    if behavior == "hang":
        threading.Event().wait()
    if behavior == "long":
        _run_long(definition, run)
    return {
        "number": definition["number"],
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "run": None if run is None else run["recorder_id"],
    }


def _run_long(definition: Mapping[str, Any], run: Mapping[str, Any] | None) -> None:
    """Beat until the file `go` exists; if interrupted, write a checkpoint line to the journal."""
    beat(RUN, experiment_id="1", recorder_id=f"run{definition['number']}", tracking_uri=None)
    go = Path(definition["go"])
    step = 0
    try:
        while not go.exists():
            step += 1
            beat("training", epoch=step, epochs=None, metrics={"valid/ic": 0.5})
            time.sleep(0.05)
    except KeyboardInterrupt:
        append_line(definition["journal"], f"checkpoint {os.getpid()}")
        raise
