"""What both programs run: a stress frame, and lists of processors by name."""

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
    """Rows that come and go, NaN, infinities, ties, flat days, a constant column; float32.

    Constants are exact in binary: Qlib sums in float32 and makes noise of a constant 0.1, where
    qtorch leaves the column as it is (ZScoreNorm) or NaN (CSZScoreNorm).
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
    gone = (rng.random(n) < 0.06) | ((index.codes[1] % 5 == 0) & (day < 20))
    gone |= (day == num_dates // 3) & (index.codes[1] != 3)
    return frame[~gone]


def cases() -> dict[str, Case]:
    """`{name: {infer_processors, learn_processors, shared_processors, process_type}}`.

    Without HashStockFormat, a layout of Qlib's storage, which then gives every segment all rows.
    """
    out: dict[str, Case] = {}
    for name, processor in _single().items():
        out[name] = {"infer_processors": [processor]}
    out["DropnaLabel"] = {"learn_processors": ["DropnaLabel"]}
    out.update(_pipelines())
    return out


def _of(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"class": name, "kwargs": kwargs}


def _single() -> dict[str, Any]:
    fitted = {
        f"{name}/{group}": _of(name, fields_group=group, **FIT)
        for name in ("MinMaxNorm", "ZScoreNorm", "RobustZScoreNorm")
        for group in ("feature", None)
    }
    day = {
        f"{name}/{group}": _of(name, fields_group=group)
        for name in ("CSZScoreNorm", "CSRankNorm")
        for group in ("feature", "label")
    }
    return {
        **fitted,
        **day,
        "CSZFillna/feature": _of("CSZFillna", fields_group="feature"),
        "CSZFillna/None": _of("CSZFillna"),
        "DropnaProcessor/feature": _of("DropnaProcessor", fields_group="feature"),
        "DropnaProcessor/None": _of("DropnaProcessor"),
        "DropCol": _of("DropCol", col_list=["X1", "LABEL1"]),
        "FilterCol": _of("FilterCol", fields_group="feature", col_list=["X3", "X0"]),
        "TanhProcess": _of("TanhProcess"),
        "ProcessInf": _of("ProcessInf"),
        "Fillna/None": _of("Fillna"),
        "Fillna/feature": _of("Fillna", fields_group="feature", fill_value=2.5),
        "RobustZScoreNorm/noclip": _of(
            "RobustZScoreNorm", fields_group="feature", clip_outlier=False, **FIT
        ),
        "CSZScoreNorm/list": _of("CSZScoreNorm", fields_group=["feature", "label"]),
        "CSZScoreNorm/robust": _of("CSZScoreNorm", fields_group="label", method="robust"),
    }


def _pipelines() -> dict[str, Case]:
    alpha360 = {
        "infer_processors": [_of("ProcessInf"), _of("ZScoreNorm", **FIT), _of("Fillna")],
        "learn_processors": ["DropnaLabel", _of("CSZScoreNorm", fields_group="label")],
    }
    recurrent = {
        "infer_processors": [
            _of("ProcessInf"),
            _of("FilterCol", fields_group="feature", col_list=["X0", "X2", "X3"]),
            _of("RobustZScoreNorm", fields_group="feature", clip_outlier=True, **FIT),
            _of("Fillna", fields_group="feature"),
        ],
        "learn_processors": ["DropnaLabel", _of("CSRankNorm", fields_group="label")],
    }
    shared = {
        "shared_processors": [_of("ProcessInf"), _of("DropCol", col_list=["X4"])],
        "infer_processors": [_of("CSZScoreNorm", fields_group="feature")],
        "learn_processors": [
            "DropnaLabel",
            _of("ZScoreNorm", fields_group="feature", **FIT),
            _of("CSRankNorm", fields_group="feature"),
        ],
    }
    kinds = {"alpha360": alpha360, "recurrent": recurrent, "shared": shared}
    return {
        f"{name} ({kind})": {**case, "process_type": kind}
        for name, case in kinds.items()
        for kind in ("append", "independent")
    }
