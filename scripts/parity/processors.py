"""Compare qtorch's processors with Qlib's, for both data keys and process types.

    compare(frame, qlib_npz, cases) -> list[Row]
    python processors.py [GOLDEN.npz]     print the table, or write Qlib's results for the tests

Qlib's values come from `qlib_processors.py`, which `ask_qlib` runs with a Python that has pyqlib.
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
from processor_cases import TEST, TRAIN, Case, cases, stress_frame

from qtorch.data.dataset.dataset import DatasetH
from qtorch.data.handler.handler import DataHandlerLP

OF_SCALE = 1e-5
"""Pass if |qtorch - Qlib| <= OF_SCALE x the column's deviation (its magnitude if constant)."""
SEGMENTS = {"train": TRAIN, "test": TEST}


@dataclass(frozen=True)
class Loader:
    """A custom data loader that returns a frame with infinities."""

    frame: pd.DataFrame

    def load(self, instruments: Any, start_time: Any, end_time: Any) -> pd.DataFrame:
        return self.frame


@dataclass(frozen=True)
class Row:
    """The agreement of one case: cells, differing NaN, worst difference in units of the scale."""

    name: str
    cells: int
    same_index: bool
    same_columns: bool
    differing_nan: int
    worst: float

    @property
    def passes(self) -> bool:
        return (
            self.same_index
            and self.same_columns
            and not self.differing_nan
            and self.worst <= OF_SCALE
        )

    def __str__(self) -> str:
        index = "index, columns equal" if self.same_index and self.same_columns else "INDEX DIFFERS"
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.name:40} {self.cells:8d} cells {index} nan {self.differing_nan:4d} "
            f"worst {self.worst:8.1e} of scale {mark}"
        )


def ask_qlib(python: str, frame: pd.DataFrame, cases: Mapping[str, Case]) -> dict[str, np.ndarray]:
    """Qlib's results for the cases."""
    script = Path(__file__).with_name("qlib_processors.py")
    with tempfile.TemporaryDirectory() as folder:
        source, request, out = (
            Path(folder) / n for n in ("frame.parquet", "cases.json", "out.npz")
        )
        flat = frame.copy(deep=False)
        flat.columns = ["/".join(c) for c in frame.columns]
        flat.to_parquet(source)
        request.write_text(json.dumps({"cases": dict(cases), "segments": SEGMENTS}))
        process = subprocess.run(
            [python, str(script), str(source), str(request), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise RuntimeError(process.stderr[-4000:])
        with np.load(out) as arrays:
            return {key: arrays[key] for key in arrays.files}


def compare(
    frame: pd.DataFrame, qlib: Mapping[str, np.ndarray], cases: Mapping[str, Case]
) -> list[Row]:
    """Compare every case, data key and segment of Qlib's results with qtorch's."""
    table = []
    for name, case in cases.items():
        handler = DataHandlerLP(data_loader=Loader(frame), **case)
        dataset = DatasetH(handler, SEGMENTS)
        for key in ("infer", "learn"):
            for segment in SEGMENTS:
                label = f"{name}|{key}|{segment}"
                prepared_frame = dataset.prepare(segment, col_set="__raw", data_key=key)
                parts = {p: qlib[f"{label}|{p}"] for p in ("values", "rows", "columns")}
                table.append(compare_frames(label, prepared_frame, frame.index, parts))
    return table


def golden_input() -> tuple[pd.DataFrame, dict[str, Case]]:
    """A smaller frame over the same dates, and the cases: the input of the stored Qlib results."""
    return stress_frame(44, 9, freq="3B"), cases()


def write_golden(python: str, target: Path) -> None:
    """Write Qlib's results for `golden_input`; only the columns that the processors changed."""
    frame, requested_cases = golden_input()
    results = ask_qlib(python, frame, requested_cases)
    out = {}
    for label in {key.rsplit("|", 1)[0] for key in results}:
        values, rows, columns = (results[f"{label}|{p}"] for p in ("values", "rows", "columns"))
        raw_values = _raw_values(frame, rows, columns)
        changed_columns = [
            k for k in range(len(columns)) if not _equal(values[:, k], raw_values[:, k])
        ]
        out[f"{label}|columns"] = columns
        out[f"{label}|rows"] = rows.astype(np.int16)
        out[f"{label}|changed"] = np.array(changed_columns, dtype=np.int16)
        out[f"{label}|values"] = values[:, changed_columns].astype(np.float32)
    np.savez_compressed(
        target, **{k: v for k, v in sorted(out.items()) if not _is_duplicate(k, out)}
    )


def read_golden(source: Path) -> dict[str, np.ndarray]:
    """Read the file of `write_golden` in the format of `ask_qlib`."""
    frame, _ = golden_input()
    with np.load(source) as arrays:
        out = {key: arrays[key] for key in arrays.files}
    for key in [k for k in out if "|infer|" in k]:
        out.setdefault(key.replace("|infer|", "|learn|"), out[key])
    for label in {key.rsplit("|", 1)[0] for key in out}:
        values = _raw_values(frame, out[f"{label}|rows"], out[f"{label}|columns"])
        values[:, out.pop(f"{label}|changed")] = out[f"{label}|values"]
        out[f"{label}|values"] = values
    return out


def _is_duplicate(key: str, out: Mapping[str, np.ndarray]) -> bool:
    """Whether this is an array of the learn view that equals that of the infer view."""
    infer_array = out[key.replace("|learn|", "|infer|")]
    return (
        "|learn|" in key
        and infer_array.dtype == out[key].dtype
        and np.array_equal(infer_array, out[key], equal_nan=infer_array.dtype.kind == "f")
    )


def _raw_values(frame: pd.DataFrame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The raw values of these rows and columns."""
    names = [tuple(c.split("/", 1)) for c in columns]
    return frame[names].to_numpy(dtype=np.float64)[rows]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def compare_frames(
    name: str, frame: pd.DataFrame, index: pd.MultiIndex, qlib: Mapping[str, np.ndarray]
) -> Row:
    """Compare one prepared frame; a column's scale is the deviation of Qlib's finite values."""
    qlib_values = qlib["values"]
    same_index = index[qlib["rows"]].equals(frame.index)
    same_columns = [*qlib["columns"]] == ["/".join(c) for c in frame.columns]
    if not same_index or not same_columns:
        return Row(name, qlib_values.size, same_index, same_columns, 0, float("nan"))
    values = frame.to_numpy(dtype=np.float64)
    differing_nan = int((np.isnan(values) != np.isnan(qlib_values)).sum())
    differing_nan += int((np.isinf(values) | np.isinf(qlib_values))[values != qlib_values].sum())
    is_finite = np.isfinite(values) & np.isfinite(qlib_values)
    worst = 0.0
    for k in range(values.shape[1]):
        a, b = values[is_finite[:, k], k], qlib_values[is_finite[:, k], k]
        if len(b):
            scale = b.std() if b.std() > 1e-6 * np.abs(b).max() else max(np.abs(b).max(), 1e-12)
            worst = max(worst, float(np.abs(a - b).max() / scale))
    return Row(name, qlib_values.size, same_index, same_columns, differing_nan, worst)


def main(python: str) -> list[Row]:
    """Print the table and return its rows."""
    frame, requested_cases = stress_frame(), cases()
    rows = compare(frame, ask_qlib(python, frame, requested_cases), requested_cases)
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    import os
    import sys

    qlib_python = os.environ["QTORCH_QLIB_PYTHON"]
    if len(sys.argv) > 1:
        write_golden(qlib_python, Path(sys.argv[1]))
    else:
        main(qlib_python)
