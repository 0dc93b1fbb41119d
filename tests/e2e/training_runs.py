"""Wait for trainings of other processes, and read what they have logged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any


def wait_for_epoch(
    runs: Callable[[], list[Any]], child: Any, epoch: int = 0, timeout: float = 240.0
) -> Any:
    """Wait until one of the runs has logged an epoch and return that run; fail if `child` ends."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        assert child.poll() is None, child.communicate()
        for run in runs():
            if epoch in run.metric_history("valid/loss"):
                return run
        time.sleep(0.1)
    raise AssertionError("the training did not reach the epoch in time")


def metric_points(database: Path, run_id: str) -> dict[tuple[str, int], float]:
    """Return `{(key, step): value}` from MLflow's table; fail if a point is there twice."""
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY key, step"
        rows = connection.execute(query, (run_id,)).fetchall()
    points = {(key, step): value for key, step, value in rows}
    assert len(points) == len(rows)
    return points
