"""qtorch's handlers and datasets against real Qlib's, from files to `prepare`.

    compare(provider, qlib_npz, cases) -> list[Row]

Qlib's numbers come from `qlib_handlers.py`, which `ask_qlib` starts under a Python with pyqlib.
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

from qtorch.data import alpha
from qtorch.data.dataset import DatasetH
from qtorch.data.handler import DataHandlerLP
from qtorch.data.source.qlib_writer import write_qlib
from qtorch.data.window_dataset import TSDatasetH

FILLS = ("none", "ffill", "ffill+bfill")
RELATIVE, OF_SCALE, SHARE = 1e-4, 1e-5, 0.9999
TRAIN, TEST = ["2015-03-02", "2015-08-31"], ["2015-09-01", "2015-12-31"]
FIT = {"fit_start_time": TRAIN[0], "fit_end_time": TRAIN[1]}
SOME = ["KMID", "ROC5", "STD10", "RSQR20", "CORR10", "VMA5", "IMAX30", "QTLU20"]
LABEL = "Ref($close, -2)/Ref($close, -1) - 1"
Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One case's agreement."""

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
    """The stress market in Qlib's layout, with a universe that instruments leave and enter."""
    market = stress_market(num_instruments, num_dates)
    dates = market.calendar
    middle = {"STR002": [(dates[0], dates[90]), (dates[120], dates[-1])]}
    late = {"STR004": [(dates[150], dates[-1])]}
    whole = {f"STR{k:03d}": [(dates[0], dates[-1])] for k in (0, 1, 3, 5, 6, 7, 9)}
    return write_qlib(market, folder, universes={"members": {**whole, **middle, **late}})


def cases() -> dict[str, Case]:
    """Handlers by name, their arguments, and what is prepared of them."""
    span = {"start_time": TRAIN[0], "end_time": TEST[1]}
    both = {"segments": {"train": TRAIN, "test": TEST}, "segment": "test", "col_set": "__raw"}
    fields = {"feature": [["$close/$open", "Mean($close, 5)"], ["CO", "MA5"]], "label": [LABEL]}
    keys = ["raw", "infer", "learn"]

    def loader(**options: Any) -> dict[str, Any]:
        return {"class": "QlibDataLoader", "kwargs": {"config": fields, **options}}

    def handler(**options: Any) -> Case:
        more = {"instruments": "members", **span, "data_loader": loader(**options)}
        return {"handler": "DataHandlerLP", "kwargs": more, "keys": ["infer"], **both}

    chosen = {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": SOME}}
    robust = {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", **FIT}}
    fill = {"class": "Fillna", "kwargs": {"fields_group": "feature"}}
    rank = {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}
    recurrent = {
        "instruments": "members",
        **span,
        "infer_processors": [chosen, robust, fill],
        "learn_processors": ["DropnaLabel", rank],
        **FIT,
    }
    members = {"instruments": "members", **span, **FIT}
    rule = "Mean($volume, 5) > 100000"
    name_rule = {"filter_type": "NameDFilter", "name_rule_re": "STR00[0-5]"}
    name_rule |= {"filter_start_time": "2015-05-01", "filter_end_time": None}
    value_rule = {"filter_type": "ExpressionDFilter", "rule_expression": rule, "keep": False}
    value_rule |= {"filter_start_time": None, "filter_end_time": "2015-10-30"}
    instant = {"class": "TimeRangeFlt", "module_path": "qlib.data.dataset.processor"}
    instant |= {"kwargs": {"start_time": TRAIN[0], "end_time": TEST[1]}}
    windows = {"step_len": 7, "col_set": ["feature", "label"], "keys": ["infer"]}
    return {
        "Alpha158": {"handler": "Alpha158", "kwargs": members, "keys": keys, **both},
        "Alpha360": {"handler": "Alpha360", "kwargs": members, "keys": keys, **both},
        "recurrent": {"handler": "Alpha158", "kwargs": recurrent, "keys": keys, **both},
        "windows": {"handler": "Alpha158", "kwargs": recurrent, **both, **windows},
        "filter by name": handler(filter_pipe=[name_rule]),
        "filter by expression": handler(filter_pipe=[value_rule]),
        "both filters": handler(filter_pipe=[name_rule, value_rule]),
        "inst_processors": handler(inst_processors=[instant]),
    }


def ask_qlib(python: str, provider: Path, asked: Mapping[str, Case]) -> dict[str, np.ndarray]:
    """Real Qlib's answer to the cases."""
    script = Path(__file__).with_name("qlib_handlers.py")
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder) / "cases.json", Path(folder) / "out.npz"
        wanted.write_text(json.dumps(asked))
        done = subprocess.run(
            [python, str(script), str(provider), str(wanted), str(out)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        with np.load(out) as found:
            return {key: found[key] for key in found.files}


def compare(provider: Path, qlib: Mapping[str, np.ndarray], asked: Mapping[str, Case]) -> list[Row]:
    """Every case and data key of Qlib's answer beside ours."""
    table = []
    for name, case in asked.items():
        dataset = _dataset(provider, case)
        for key in case["keys"]:
            where = f"{name}|{key}"
            found = dataset.prepare(case["segment"], col_set=case["col_set"], data_key=key)
            if case.get("step_len") is None:
                table.append(_frame(where, found, qlib))
                continue
            same = _same_index(found.get_index(), qlib, where)
            for fill in FILLS:
                found.config(fillna_type=fill)
                windows = found[list(range(len(found)))]
                agree = _agree(windows, qlib[f"{where}|{fill}"]) if same else 0.0
                table.append(Row(f"{where}|{fill}", windows.size, same, True, agree))
    return table


def _dataset(provider: Path, case: Case) -> DatasetH:
    build = getattr(alpha, case["handler"], DataHandlerLP)
    handler = build(**_ours(case["kwargs"]), source=str(provider))
    if case.get("step_len") is None:
        return DatasetH(handler, case["segments"])
    return TSDatasetH(handler, case["segments"], step_len=case["step_len"])


def _ours(value: Any) -> Any:
    """The same configuration without the names of Qlib's modules."""
    if isinstance(value, dict):
        return {k: _ours(v) for k, v in value.items() if k != "module_path"}
    return [_ours(v) for v in value] if isinstance(value, list) else value


def _frame(where: str, ours: pd.DataFrame, qlib: Mapping[str, np.ndarray]) -> Row:
    columns = ["/".join(c) if isinstance(c, tuple) else c for c in ours.columns]
    same_columns = columns == [*qlib[f"{where}|columns"]]
    same = _same_index(ours.index, qlib, where)
    theirs = qlib[f"{where}|values"]
    agree = _agree(ours.to_numpy(), theirs) if same and same_columns else 0.0
    return Row(where, theirs.size, same, same_columns, agree)


def _same_index(index: pd.MultiIndex, qlib: Mapping[str, np.ndarray], where: str) -> bool:
    dates = pd.DatetimeIndex(index.get_level_values("datetime")).as_unit("ns").asi8
    names = index.get_level_values("instrument")
    theirs = qlib[f"{where}|instrument"]
    return np.array_equal(dates, qlib[f"{where}|date"]) and [*names] == [*theirs]


def _agree(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of cells within 1e-4 of Qlib's, or 1e-5 of their column's deviation.

    On flat windows a deviation is 0 here; Qlib divides its rounding by 1e-12 and shows 1e8.
    """
    ours = ours.astype(np.float64).reshape(-1, ours.shape[-1])
    theirs = theirs.reshape(ours.shape)
    with np.errstate(invalid="ignore"):
        scale = np.nanstd(np.where(np.isfinite(theirs), theirs, np.nan), axis=0)
        near = np.abs(ours - theirs) <= RELATIVE * np.abs(theirs) + OF_SCALE * np.nan_to_num(scale)
    flat = (ours == 0) & (np.abs(theirs) > 1e6)
    same = near | (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)) | flat
    return float(same.mean())


def main(python: str) -> list[Row]:
    """Print the table; the rows."""
    with tempfile.TemporaryDirectory() as folder:
        provider = write_market(Path(folder) / "market")
        asked = cases()
        rows = compare(provider, ask_qlib(python, provider, asked), asked)
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    import os

    main(os.environ["QTORCH_QLIB_PYTHON"])
