"""Compare the windows of Samples with every window of Qlib's TSDataSampler, for all three fills.

QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/windows.py [--provider-uri FOLDER]

The features are the row number (exact in float32, so that a window shows which rows it contains)
and a column with NaN. No processors are applied.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from qtorch.data.dataset.qlib_dataset import build_samples, view_from_frame
from qtorch.data.panel.panel import Panel

FILLS = ("none", "ffill", "ffill+bfill")
Segments = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    segment: str
    fill: str
    windows: int
    different: int


def stress_frame(num_dates: int = 60, num_instruments: int = 8, seed: int = 0) -> pd.DataFrame:
    """A small market with a late listing, a delisting, suspensions, missing rows, an empty day."""
    rng = np.random.default_rng(seed)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    names = [f"SH{600000 + 7 * k}" for k in range(num_instruments)]
    exists = rng.random((num_dates, num_instruments)) > 0.12
    exists[: num_dates // 3, 1] = False  # a late listing
    exists[num_dates // 2 :, 2] = False  # a delisting
    exists[num_dates // 4 : num_dates // 2, 3] = False  # a suspension longer than a window
    exists[num_dates // 2 + 3] = False  # a day on which nothing trades
    positions = np.argwhere(exists)
    index = pd.MultiIndex.from_arrays(
        [dates[positions[:, 0]], [names[k] for k in positions[:, 1]]],
        names=["datetime", "instrument"],
    )
    return row_number_frame(index, rng)


def row_number_frame(index: pd.MultiIndex, rng: np.random.Generator) -> pd.DataFrame:
    """Build a frame over `index` with the row number, a column with NaN, and a label."""
    holes = rng.standard_normal(len(index)).astype(np.float32)
    holes[rng.random(len(index)) < 0.1] = np.nan
    return pd.DataFrame(
        {
            ("feature", "ROW"): np.arange(len(index), dtype=np.float32),
            ("feature", "HOLES"): holes,
            ("label", "LABEL0"): rng.standard_normal(len(index)).astype(np.float32),
        },
        index=index,
    )


def qlib_windows(
    frame: pd.DataFrame, segments: Segments, step_len: int, python: str, folder: Path
) -> dict[str, np.ndarray]:
    """Qlib's windows, as `segment/fill`, `segment/date` (ns) and `segment/instrument`."""
    flat_frame = frame.copy()
    flat_frame.columns = pd.Index(["/".join(c) for c in frame.columns])
    source, target = folder / "frame.parquet", folder / "windows.npz"
    flat_frame.to_parquet(source)
    spans = [f"{name}={start},{end}" for name, (start, end) in segments.items()]
    script = Path(__file__).with_name("qlib_windows.py")
    command = [python, str(script), str(source), str(target), str(step_len), *spans]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if process.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{process.stderr[-3000:]}")
    with np.load(target) as arrays:
        return {name: arrays[name] for name in arrays.files}


def compare(
    frame: pd.DataFrame, segments: Segments, step_len: int, qlib_arrays: Mapping[str, np.ndarray]
) -> list[Row]:
    """Count the windows that differ from Qlib's in the features or the label of the last row."""
    view = view_from_frame(frame)
    table = []
    for name, (start, end) in segments.items():
        dates = pd.DatetimeIndex(qlib_arrays[f"{name}/date"]).as_unit("ns")
        index = pd.MultiIndex.from_arrays([dates, qlib_arrays[f"{name}/instrument"].astype(str)])
        for fill in FILLS:
            samples = build_samples(view, start=start, end=end, step_len=step_len, fill=fill)
            positions = index.get_indexer(samples.index)
            if len(index) != len(samples) or (positions < 0).any():
                raise RuntimeError(f"{name}: {len(samples)} samples, Qlib has {len(index)}")
            num_different = 0
            for rows in torch.arange(len(samples)).split(8192):
                batch = samples.batch(rows)
                qlib_batch = torch.from_numpy(
                    qlib_arrays[f"{name}/{fill}"][positions[rows.numpy()]]
                )
                assert batch.y is not None
                is_different = ~_equal(batch.x, qlib_batch[:, :, :-1]).flatten(1).all(1)
                is_different |= ~_equal(batch.y[:, 0], qlib_batch[:, -1, -1])
                num_different += int(is_different.sum())
            table.append(Row(name, fill, len(samples), num_different))
    return table


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def provider_frame(provider_uri: str) -> pd.DataFrame:
    """A row number frame over the rows of a Qlib folder."""
    from qtorch.data.source.qlib import QlibSource

    panel: Panel = QlibSource(provider_uri).load(["close"])
    index = panel.to_frame().index
    assert isinstance(index, pd.MultiIndex)
    return row_number_frame(index, np.random.default_rng(0))


def main() -> int:
    """Print the table; return 1 if any window differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--provider-uri")
    parser.add_argument("--python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument("--step-len", type=int, default=20)
    args = parser.parse_args()
    if not args.python:
        parser.error("set --python or QTORCH_QLIB_PYTHON to a Python with pyqlib")
    frame = provider_frame(args.provider_uri) if args.provider_uri else stress_frame()
    dates = frame.index.get_level_values("datetime").unique().sort_values()
    starts = [str(dates[int(len(dates) * share)].date()) for share in (0, 0.7, 0.8)]
    ends = [str(dates[int(len(dates) * share) - 1].date()) for share in (0.7, 0.8, 1.0)]
    segments = dict(zip(("train", "valid", "test"), zip(starts, ends, strict=True), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        qlib_arrays = qlib_windows(frame, segments, args.step_len, args.python, Path(folder))
    table = compare(frame, segments, args.step_len, qlib_arrays)
    print(f"{'segment':8} {'fill':12} {'windows':>9} {'different':>9}")
    for row in table:
        print(f"{row.segment:8} {row.fill:12} {row.windows:9,} {row.different:9,}")
    return int(any(row.different for row in table))


if __name__ == "__main__":
    sys.exit(main())
