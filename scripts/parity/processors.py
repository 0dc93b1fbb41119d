"""qtorch's processors against real Qlib's, both data keys and process types.

    compare(frame, qlib_npz, cases) -> list[Row]
    python processors.py [GOLDEN.npz]     the table, or Qlib's answers kept for the tests

Qlib's numbers come from `qlib_processors.py`, which `ask_qlib` starts under a Python with pyqlib.
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

from qtorch.data.dataset import DatasetH
from qtorch.data.handler import DataHandlerLP

OF_SCALE = 1e-5
"""|ours - Qlib's| <= OF_SCALE x the column's deviation (or its size, where it is constant)."""
SEGMENTS = {"train": TRAIN, "test": TEST}


@dataclass(frozen=True)
class Loader:
    """Gives a frame with infinities in it, which is for a loader of one's own to do."""

    frame: pd.DataFrame

    def load(self, instruments: Any, start_time: Any, end_time: Any) -> pd.DataFrame:
        return self.frame


@dataclass(frozen=True)
class Row:
    """One case's agreement: cells, differing NaNs, worst difference in units of the scale."""

    name: str
    cells: int
    same_index: bool
    same_columns: bool
    other_nan: int
    worst: float

    @property
    def passes(self) -> bool:
        return (
            self.same_index and self.same_columns and not self.other_nan and self.worst <= OF_SCALE
        )

    def __str__(self) -> str:
        index = "index, columns equal" if self.same_index and self.same_columns else "INDEX DIFFERS"
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.name:40} {self.cells:8d} cells {index} nan {self.other_nan:4d} "
            f"worst {self.worst:8.1e} of scale {mark}"
        )


def ask_qlib(python: str, frame: pd.DataFrame, cases: Mapping[str, Case]) -> dict[str, np.ndarray]:
    """Real Qlib's answer to the cases."""
    script = Path(__file__).with_name("qlib_processors.py")
    with tempfile.TemporaryDirectory() as folder:
        source, asked, out = (Path(folder) / n for n in ("frame.parquet", "cases.json", "out.npz"))
        flat = frame.copy(deep=False)
        flat.columns = ["/".join(c) for c in frame.columns]
        flat.to_parquet(source)
        asked.write_text(json.dumps({"cases": dict(cases), "segments": SEGMENTS}))
        done = subprocess.run(
            [python, str(script), str(source), str(asked), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        with np.load(out) as found:
            return {key: found[key] for key in found.files}


def compare(
    frame: pd.DataFrame, qlib: Mapping[str, np.ndarray], cases: Mapping[str, Case]
) -> list[Row]:
    """Every case, data key and segment of Qlib's answer beside ours."""
    table = []
    for name, case in cases.items():
        handler = DataHandlerLP(data_loader=Loader(frame), **case)
        dataset = DatasetH(handler, SEGMENTS)
        for key in ("infer", "learn"):
            for segment in SEGMENTS:
                where = f"{name}|{key}|{segment}"
                ours = dataset.prepare(segment, col_set="__raw", data_key=key)
                parts = {p: qlib[f"{where}|{p}"] for p in ("values", "rows", "columns")}
                table.append(compare_frames(where, ours, frame.index, parts))
    return table


def golden_input() -> tuple[pd.DataFrame, dict[str, Case]]:
    """A smaller frame over the same dates, and the cases: what the repository keeps of Qlib."""
    return stress_frame(44, 9, freq="3B"), cases()


def write_golden(python: str, target: Path) -> None:
    """Keep Qlib's answer to `golden_input`: of each frame the columns that it changed."""
    frame, asked = golden_input()
    found = ask_qlib(python, frame, asked)
    out = {}
    for where in {key.rsplit("|", 1)[0] for key in found}:
        values, rows, columns = (found[f"{where}|{p}"] for p in ("values", "rows", "columns"))
        given = _given(frame, rows, columns)
        changed = [k for k in range(len(columns)) if not _equal(values[:, k], given[:, k])]
        out[f"{where}|columns"] = columns
        out[f"{where}|rows"] = rows.astype(np.int16)
        out[f"{where}|changed"] = np.array(changed, dtype=np.int16)
        out[f"{where}|values"] = values[:, changed].astype(np.float32)
    np.savez_compressed(target, **{k: v for k, v in sorted(out.items()) if not _doubled(k, out)})


def read_golden(source: Path) -> dict[str, np.ndarray]:
    """What `write_golden` kept, as `ask_qlib` gives it."""
    frame, _ = golden_input()
    with np.load(source) as kept:
        out = {key: kept[key] for key in kept.files}
    for key in [k for k in out if "|infer|" in k]:
        out.setdefault(key.replace("|infer|", "|learn|"), out[key])
    for where in {key.rsplit("|", 1)[0] for key in out}:
        values = _given(frame, out[f"{where}|rows"], out[f"{where}|columns"])
        values[:, out.pop(f"{where}|changed")] = out[f"{where}|values"]
        out[f"{where}|values"] = values
    return out


def _doubled(key: str, out: Mapping[str, np.ndarray]) -> bool:
    """Whether this is an array of learn that infer has too."""
    other = out[key.replace("|learn|", "|infer|")]
    return (
        "|learn|" in key
        and other.dtype == out[key].dtype
        and np.array_equal(other, out[key], equal_nan=other.dtype.kind == "f")
    )


def _given(frame: pd.DataFrame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The raw values of these rows and columns."""
    wanted = [tuple(c.split("/", 1)) for c in columns]
    return frame[wanted].to_numpy(dtype=np.float64)[rows]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def compare_frames(
    name: str, ours: pd.DataFrame, index: pd.MultiIndex, qlib: Mapping[str, np.ndarray]
) -> Row:
    """One prepared frame; the scale of a column is the deviation of Qlib's finite values."""
    theirs = qlib["values"]
    same_index = index[qlib["rows"]].equals(ours.index)
    same_columns = [*qlib["columns"]] == ["/".join(c) for c in ours.columns]
    if not same_index or not same_columns:
        return Row(name, theirs.size, same_index, same_columns, 0, float("nan"))
    values = ours.to_numpy(dtype=np.float64)
    other_nan = int((np.isnan(values) != np.isnan(theirs)).sum())
    other_nan += int((np.isinf(values) | np.isinf(theirs))[values != theirs].sum())
    both = np.isfinite(values) & np.isfinite(theirs)
    worst = 0.0
    for k in range(values.shape[1]):
        a, b = values[both[:, k], k], theirs[both[:, k], k]
        if len(b):
            scale = b.std() if b.std() > 1e-6 * np.abs(b).max() else max(np.abs(b).max(), 1e-12)
            worst = max(worst, float(np.abs(a - b).max() / scale))
    return Row(name, theirs.size, same_index, same_columns, other_nan, worst)


def main(python: str) -> list[Row]:
    """Print the table; the rows."""
    frame, asked = stress_frame(), cases()
    rows = compare(frame, ask_qlib(python, frame, asked), asked)
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
