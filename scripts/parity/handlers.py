"""Compare qtorch's handlers and datasets with Qlib's, from the stored bars to `prepare`.

    compare(provider, qlib_npz, cases) -> list[Row]

Qlib's values come from `qlib_handlers.py`, which `ask_qlib` runs with a Python that has pyqlib.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from stress import stress_market

from qtorch.data.dataset.dataset import DatasetH, TSDatasetH
from qtorch.data.handler import alpha
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.source.writer import write_qlib

FILLS = ("none", "ffill", "ffill+bfill")
RELATIVE, OF_SCALE, SHARE = 1e-4, 1e-5, 0.9999
TRAIN, TEST = ["2015-03-02", "2015-08-31"], ["2015-09-01", "2015-12-31"]
FIT = {"fit_start_time": TRAIN[0], "fit_end_time": TRAIN[1]}
SELECTED_FEATURES = ["KMID", "ROC5", "STD10", "RSQR20", "CORR10", "VMA5", "IMAX30", "QTLU20"]
LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The agreement of one case."""

    name: str
    cells: int
    same_index: bool
    same_columns: bool
    agree: float

    @property
    def passes(self) -> bool:
        return self.same_index and self.same_columns and self.agree >= SHARE

    def __str__(self) -> str:
        index = "index, columns equal" if self.same_index and self.same_columns else "INDEX DIFFERS"
        mark = "ok" if self.passes else "FAILS"
        return f"{self.name:40} {self.cells:8d} cells {index} agree {100 * self.agree:.4f}% {mark}"


def write_market(folder: Path, *, num_instruments: int = 14, num_dates: int = 230) -> Path:
    """Write the stress market in Qlib's layout, with a universe whose members change."""
    market = stress_market(num_instruments, num_dates)
    dates = market.calendar
    two_spans = {"STR002": [(dates[0], dates[90]), (dates[120], dates[-1])]}
    late = {"STR004": [(dates[150], dates[-1])]}
    always = {f"STR{k:03d}": [(dates[0], dates[-1])] for k in (0, 1, 3, 5, 6, 7, 9)}
    return write_qlib(market, folder, universes={"members": {**always, **two_spans, **late}})


def cases() -> dict[str, Case]:
    """The cases by name: a handler, its arguments, and the segment and data keys to prepare."""
    span = {"start_time": TRAIN[0], "end_time": TEST[1]}
    common = {"segments": {"train": TRAIN, "test": TEST}, "segment": "test", "col_set": "__raw"}
    fields = {"feature": [["$close/$open", "Mean($close, 5)"], ["CO", "MA5"]], "label": [LABEL]}
    keys = ["raw", "infer", "learn"]

    def loader(**options: Any) -> dict[str, Any]:
        return {"class": "QlibDataLoader", "kwargs": {"config": fields, **options}}

    def handler(**options: Any) -> Case:
        kwargs = {"instruments": "members", **span, "data_loader": loader(**options)}
        return {"handler": "DataHandlerLP", "kwargs": kwargs, "keys": ["infer"], **common}

    selected_columns = {
        "class": "FilterCol",
        "kwargs": {"fields_group": "feature", "col_list": SELECTED_FEATURES},
    }
    robust = {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", **FIT}}
    fill = {"class": "Fillna", "kwargs": {"fields_group": "feature"}}
    rank = {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}
    recurrent = {
        "instruments": "members",
        **span,
        "infer_processors": [selected_columns, robust, fill],
        "learn_processors": ["DropnaLabel", rank],
        **FIT,
    }
    members = {"instruments": "members", **span, **FIT}
    # Fewer days than these would show the rounding of Qlib's means in float32. ProcessInf is left
    # out: Qlib's takes a second for each day of 360 columns, and `processors.py` compares it.
    short_train, short_test = ["2015-07-20", "2015-08-31"], ["2015-09-01", "2015-10-02"]
    short_members = {
        "instruments": "members",
        "start_time": short_train[0],
        "end_time": short_test[1],
        "fit_start_time": short_train[0],
        "fit_end_time": short_train[1],
        "infer_processors": [
            {"class": "ZScoreNorm", "kwargs": {}},
            {"class": "Fillna", "kwargs": {}},
        ],
    }
    short = {**common, "segments": {"train": short_train, "test": short_test}}
    rule = "Mean($volume, 5) > 100000"
    name_rule = {"filter_type": "NameDFilter", "name_rule_re": "STR00[0-5]"}
    name_rule |= {"filter_start_time": "2015-05-01", "filter_end_time": None}
    value_rule = {"filter_type": "ExpressionDFilter", "rule_expression": rule, "keep": False}
    value_rule |= {"filter_start_time": None, "filter_end_time": "2015-10-30"}
    instant = {"class": "TimeRangeFlt", "module_path": "qlib.data.dataset.processor"}
    instant |= {"kwargs": {"start_time": TRAIN[0], "end_time": TEST[1]}}
    windows = {"step_len": 7, "col_set": ["feature", "label"], "keys": ["infer"]}
    return {
        "Alpha158": {"handler": "Alpha158", "kwargs": members, "keys": keys, **common},
        "Alpha360": {"handler": "Alpha360", "kwargs": short_members, "keys": keys, **short},
        "recurrent": {"handler": "Alpha158", "kwargs": recurrent, "keys": keys, **common},
        "windows": {"handler": "Alpha158", "kwargs": recurrent, **common, **windows},
        "filter by name": handler(filter_pipe=[name_rule]),
        "filter by expression": handler(filter_pipe=[value_rule]),
        "both filters": handler(filter_pipe=[name_rule, value_rule]),
        "inst_processors": handler(inst_processors=[instant]),
    }


def ask_qlib(
    python: str, provider: Path, requested_cases: Mapping[str, Case]
) -> dict[str, np.ndarray]:
    """Qlib's results for the cases."""
    script = Path(__file__).with_name("qlib_handlers.py")
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "cases.json", Path(folder) / "out.npz"
        request.write_text(json.dumps(requested_cases))
        process = subprocess.run(
            [python, str(script), str(provider), str(request), str(out)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if process.returncode:
            raise RuntimeError(process.stderr[-4000:])
        with np.load(out) as arrays:
            return {key: arrays[key] for key in arrays.files}


def compare(
    provider: Path, qlib: Mapping[str, np.ndarray], requested_cases: Mapping[str, Case]
) -> list[Row]:
    """Compare every case and data key of Qlib's results with qtorch's."""
    table = []
    for name, case in requested_cases.items():
        dataset = _build_dataset(provider, case)
        for key in case["keys"]:
            label = f"{name}|{key}"
            prepared_data = dataset.prepare(case["segment"], col_set=case["col_set"], data_key=key)
            if case.get("step_len") is None:
                table.append(_compare_frame(label, prepared_data, qlib))
                continue
            is_same_index = _has_same_index(prepared_data.get_index(), qlib, label)
            for fill in FILLS:
                prepared_data.config(fillna_type=fill)
                windows = prepared_data[list(range(len(prepared_data)))]
                agreement = _agreement(windows, qlib[f"{label}|{fill}"]) if is_same_index else 0.0
                table.append(Row(f"{label}|{fill}", windows.size, is_same_index, True, agreement))
    return table


def _build_dataset(provider: Path, case: Case) -> DatasetH:
    build = getattr(alpha, case["handler"], DataHandlerLP)
    handler = build(**_drop_module_paths(case["kwargs"]), source=str(provider))
    if case.get("step_len") is None:
        return DatasetH(handler, case["segments"])
    return TSDatasetH(handler, case["segments"], step_len=case["step_len"])


def _drop_module_paths(value: Any) -> Any:
    """The configuration without the paths of Qlib's modules."""
    if isinstance(value, dict):
        return {k: _drop_module_paths(v) for k, v in value.items() if k != "module_path"}
    return [_drop_module_paths(v) for v in value] if isinstance(value, list) else value


def _compare_frame(label: str, frame: pd.DataFrame, qlib: Mapping[str, np.ndarray]) -> Row:
    columns = ["/".join(c) if isinstance(c, tuple) else c for c in frame.columns]
    same_columns = columns == [*qlib[f"{label}|columns"]]
    same_index = _has_same_index(frame.index, qlib, label)
    qlib_values = qlib[f"{label}|values"]
    agreement = _agreement(frame.to_numpy(), qlib_values) if same_index and same_columns else 0.0
    return Row(label, qlib_values.size, same_index, same_columns, agreement)


def _has_same_index(index: pd.MultiIndex, qlib: Mapping[str, np.ndarray], label: str) -> bool:
    dates = pd.DatetimeIndex(index.get_level_values("datetime")).as_unit("ns").asi8
    names = index.get_level_values("instrument")
    qlib_names = qlib[f"{label}|instrument"]
    return np.array_equal(dates, qlib[f"{label}|date"]) and [*names] == [*qlib_names]


def _agreement(values: np.ndarray, qlib_values: np.ndarray) -> float:
    """The fraction of cells within 1e-4 of Qlib's, or within 1e-5 of the column's deviation.

    On constant windows qtorch's standardised value is 0, while Qlib divides its rounding error by
    1e-12 and returns about 1e8; such cells count as equal.
    """
    values = values.astype(np.float64).reshape(-1, values.shape[-1])
    qlib_values = qlib_values.reshape(values.shape)
    with np.errstate(invalid="ignore"):
        scale = np.nanstd(np.where(np.isfinite(qlib_values), qlib_values, np.nan), axis=0)
        is_near = np.abs(values - qlib_values) <= RELATIVE * np.abs(
            qlib_values
        ) + OF_SCALE * np.nan_to_num(scale)
    is_flat = (values == 0) & (np.abs(qlib_values) > 1e6)
    is_same = (
        is_near | (values == qlib_values) | (np.isnan(values) & np.isnan(qlib_values)) | is_flat
    )
    return float(is_same.mean())


def main(python: str) -> list[Row]:
    """Print the table and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        provider = write_market(Path(folder) / "market")
        requested_cases = cases()
        rows = compare(provider, ask_qlib(python, provider, requested_cases), requested_cases)
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    import os

    main(os.environ["QTORCH_QLIB_PYTHON"])
