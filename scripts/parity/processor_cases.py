"""Cases for comparing processors with Qlib's: a stress frame, and lists of processors by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

FIT = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-03-31"}
TRAIN, TEST = ("2020-01-01", "2020-03-31"), ("2020-04-01", "2020-06-30")
Case = dict[str, Any]


def stress_frame(
    num_dates: int = 130, num_instruments: int = 30, seed: int = 7, freq: str = "B"
) -> pd.DataFrame:
    """A float32 frame with missing rows, NaN, infinities, ties, flat days and a constant column.

    The constants are exact in binary: for a constant such as 0.1 Qlib's float32 sums give rounding
    noise, while qtorch leaves the column unchanged (ZScoreNorm) or NaN (CSZScoreNorm).
    """
    rng = np.random.default_rng(seed)
    dates = pd.date_range("2020-01-01", periods=num_dates, freq=freq).as_unit("ns")
    names = [f"S{k:03d}" for k in range(num_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    n = len(index)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    x[:, 1] = 10 + 3 * x[:, 1]
    x[:, 2] = np.round(x[:, 2] * 2) / 2
    x[:, 3] = np.exp(3 * x[:, 3])
    x[:, 4] = 0.5
    x[rng.random((n, 6)) < 0.05] = np.nan
    x[rng.random(n) < 0.01, 0] = np.inf
    x[rng.random(n) < 0.01, 3] = -np.inf
    label = rng.standard_normal((n, 2)).astype(np.float32)
    label[:, 1] = np.round(label[:, 1])
    label[rng.random(n) < 0.04, 0] = np.nan
    day = index.codes[0]
    x[day == 17, 2] = 3.5
    label[day == 17] = 0.25
    label[day >= num_dates - 2] = np.nan
    groups = [("feature", f"X{k}") for k in range(6)] + [("label", "LABEL0"), ("label", "LABEL1")]
    frame = pd.DataFrame(np.concatenate([x, label], 1), index, pd.MultiIndex.from_tuples(groups))
    is_missing = (rng.random(n) < 0.06) | ((index.codes[1] % 5 == 0) & (day < 20))
    is_missing |= (day == num_dates // 3) & (index.codes[1] != 3)
    return frame[~is_missing]


def cases() -> dict[str, Case]:
    """`{name: {infer_processors, learn_processors, shared_processors, process_type}}`.

    HashStockFormat is left out: it is a storage layout of Qlib with which every segment returns
    all rows.
    """
    out: dict[str, Case] = {}
    for name, processor in _single_processors().items():
        out[name] = {"infer_processors": [processor]}
    out["DropnaLabel"] = {"learn_processors": ["DropnaLabel"]}
    out.update(_pipelines())
    return out


def _processor(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"class": name, "kwargs": kwargs}


def _single_processors() -> dict[str, Any]:
    fitted_processors = {
        f"{name}/{group}": _processor(name, fields_group=group, **FIT)
        for name in ("MinMaxNorm", "ZScoreNorm", "RobustZScoreNorm")
        for group in ("feature", None)
    }
    daily_processors = {
        f"{name}/{group}": _processor(name, fields_group=group)
        for name in ("CSZScoreNorm", "CSRankNorm")
        for group in ("feature", "label")
    }
    return {
        **fitted_processors,
        **daily_processors,
        "CSZFillna/feature": _processor("CSZFillna", fields_group="feature"),
        "CSZFillna/None": _processor("CSZFillna"),
        "DropnaProcessor/feature": _processor("DropnaProcessor", fields_group="feature"),
        "DropnaProcessor/None": _processor("DropnaProcessor"),
        "DropCol": _processor("DropCol", col_list=["X1", "LABEL1"]),
        "FilterCol": _processor("FilterCol", fields_group="feature", col_list=["X3", "X0"]),
        "TanhProcess": _processor("TanhProcess"),
        "ProcessInf": _processor("ProcessInf"),
        "Fillna/None": _processor("Fillna"),
        "Fillna/feature": _processor("Fillna", fields_group="feature", fill_value=2.5),
        "RobustZScoreNorm/noclip": _processor(
            "RobustZScoreNorm", fields_group="feature", clip_outlier=False, **FIT
        ),
        "CSZScoreNorm/list": _processor("CSZScoreNorm", fields_group=["feature", "label"]),
        "CSZScoreNorm/robust": _processor("CSZScoreNorm", fields_group="label", method="robust"),
    }


def _pipelines() -> dict[str, Case]:
    alpha360 = {
        "infer_processors": [
            _processor("ProcessInf"),
            _processor("ZScoreNorm", **FIT),
            _processor("Fillna"),
        ],
        "learn_processors": ["DropnaLabel", _processor("CSZScoreNorm", fields_group="label")],
    }
    recurrent = {
        "infer_processors": [
            _processor("ProcessInf"),
            _processor("FilterCol", fields_group="feature", col_list=["X0", "X2", "X3"]),
            _processor("RobustZScoreNorm", fields_group="feature", clip_outlier=True, **FIT),
            _processor("Fillna", fields_group="feature"),
        ],
        "learn_processors": ["DropnaLabel", _processor("CSRankNorm", fields_group="label")],
    }
    shared_pipeline = {
        "shared_processors": [_processor("ProcessInf"), _processor("DropCol", col_list=["X4"])],
        "infer_processors": [_processor("CSZScoreNorm", fields_group="feature")],
        "learn_processors": [
            "DropnaLabel",
            _processor("ZScoreNorm", fields_group="feature", **FIT),
            _processor("CSRankNorm", fields_group="feature"),
        ],
    }
    pipelines = {"alpha360": alpha360, "recurrent": recurrent, "shared": shared_pipeline}
    return {
        f"{name} ({process_type})": {**case, "process_type": process_type}
        for name, case in pipelines.items()
        for process_type in ("append", "independent")
    }
