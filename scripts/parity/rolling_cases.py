"""Rolling tasks and ensembles for a comparison with Qlib; used on both sides.

    PYTHON_WITH_QLIB scripts/parity/qlib_rolling.py > tests/golden/qlib_rolling.json

writes Qlib's results; `tests/task/test_rolling_of_qlib.py` compares them.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd

HOLIDAYS = pd.DatetimeIndex(["2015-01-01", "2016-03-25", "2017-07-04", "2018-11-22"])
CALENDAR = pd.bdate_range("2014-06-02", "2018-12-31").difference(HOLIDAYS)
SEGMENTS: dict[str, dict[str, tuple[str, str]]] = {
    "aligned": {
        "train": ("2015-01-02", "2016-06-30"),
        "valid": ("2016-07-01", "2016-12-30"),
        "test": ("2017-01-03", "2018-06-29"),
    },
    "weekends": {
        "train": ("2015-01-01", "2016-03-25"),
        "valid": ("2016-03-26", "2017-01-01"),
        "test": ("2017-07-01", "2018-09-30"),
    },
    "to the calendar's end": {
        "train": ("2014-06-08", "2017-12-31"),
        "valid": ("2018-01-01", "2018-04-30"),
        "test": ("2018-05-01", "2018-12-31"),
    },
    "without valid": {"train": ("2015-02-01", "2017-02-28"), "test": ("2017-03-01", "2017-05-31")},
}
ENDS = ("2017-03-31", None)
STEPS, TYPES, CUTS = (20, 63), ("expanding", "sliding"), (0, 6)


def rolling_cases() -> dict[str, dict[str, Any]]:
    """`{name: {segments, end_time, step, rtype, trunc_days}}`; 0 is no truncation (Qlib: None)."""
    grid = product(SEGMENTS, ENDS, STEPS, TYPES, CUTS)
    return {
        f"{segments}, handler to {end}, step {step}, {rtype}, cut {cut}": {
            "segments": SEGMENTS[segments],
            "end_time": end,
            "step": step,
            "rtype": rtype,
            "trunc_days": cut,
        }
        for segments, end, step, rtype, cut in grid
    }


def build_task(segments: dict[str, Any], end_time: str | None) -> dict[str, Any]:
    """Build a task in Qlib's format."""
    handler = {"start_time": "2014-06-02", "end_time": end_time, "instruments": "all"}
    return {
        "model": {"class": "Nothing", "module_path": "nowhere"},
        "dataset": {
            "class": "DatasetH",
            "module_path": "qlib.data.dataset",
            "kwargs": {
                "handler": {"class": "Alpha158", "module_path": "nowhere", "kwargs": handler},
                "segments": dict(segments),
            },
        },
    }


def task_windows(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The segments and the handler's end time of each task, as text."""
    out = []
    for task in tasks:
        kwargs = task["dataset"]["kwargs"]
        out.append(
            {
                "segments": {k: [_date_text(d) for d in v] for k, v in kwargs["segments"].items()},
                "end_time": _date_text(kwargs["handler"]["kwargs"]["end_time"]),
            }
        )
    return out


def _date_text(date: Any) -> str | None:
    return None if date is None else f"{pd.Timestamp(date):%Y-%m-%d}"


def scores() -> dict[Any, pd.DataFrame]:
    """Three overlapping windows of scores, each with some rows missing."""
    random = np.random.default_rng(5)
    windows = {}
    for k, first in enumerate(("2018-01-22", "2018-01-08", "2018-01-02")):
        dates = pd.bdate_range(first, periods=12)
        index = pd.MultiIndex.from_product(
            [dates, [f"I{n}" for n in range(7)]], names=["datetime", "instrument"]
        )
        is_kept = random.random(len(index)) > 0.1
        values = random.normal(loc=k, scale=1 + k, size=len(index)).round(6)
        windows[("lstm", f"window {k}")] = pd.DataFrame({"score": values}, index=index)[is_kept]
    return windows


def flatten(result: pd.DataFrame | pd.Series) -> list[list[Any]]:
    """Convert to rows `[date, instrument, value]` in the order of the result."""
    values = result.iloc[:, 0] if isinstance(result, pd.DataFrame) else result
    rows = zip(values.index, values, strict=True)
    return [[f"{i[0]:%Y-%m-%d}", i[1], None if pd.isna(v) else float(v)] for i, v in rows]
