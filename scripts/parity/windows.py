"""Windows of Samples against every window of real Qlib's TSDataSampler, all three fills.

QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/windows.py [--provider-uri FOLDER]

Features are taken as they are: each row's own number (float32 holds it exactly, so that a
window shows which rows it is made of), and one column with holes.
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

from qtorch.data.foreign import view_of_frame
from qtorch.data.panel import Panel
from qtorch.data.samples import build_samples

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
    """A small market with late listings, delistings, suspensions, holes and an empty day."""
    rng = np.random.default_rng(seed)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    names = [f"SH{600000 + 7 * k}" for k in range(num_instruments)]
    exists = rng.random((num_dates, num_instruments)) > 0.12
    exists[: num_dates // 3, 1] = False  # a late listing
    exists[num_dates // 2 :, 2] = False  # a delisting
    exists[num_dates // 4 : num_dates // 2, 3] = False  # a suspension longer than a window
    exists[num_dates // 2 + 3] = False  # a day on which nothing trades
    at = np.argwhere(exists)
    index = pd.MultiIndex.from_arrays(
        [dates[at[:, 0]], [names[k] for k in at[:, 1]]], names=["datetime", "instrument"]
    )
    return numbered(index, rng)


def numbered(index: pd.MultiIndex, rng: np.random.Generator) -> pd.DataFrame:
    """A frame over `index`: the row's own number, a column with holes, a label."""
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
    """What real Qlib gives, by `segment/fill`, `segment/date` (ns) and `segment/instrument`."""
    flat = frame.copy()
    flat.columns = pd.Index(["/".join(c) for c in frame.columns])
    source, target = folder / "frame.parquet", folder / "windows.npz"
    flat.to_parquet(source)
    spans = [f"{name}={start},{end}" for name, (start, end) in segments.items()]
    script = Path(__file__).with_name("qlib_windows.py")
    command = [python, str(script), str(source), str(target), str(step_len), *spans]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{done.stderr[-3000:]}")
    with np.load(target) as found:
        return {name: found[name] for name in found.files}


def compare(
    frame: pd.DataFrame, segments: Segments, step_len: int, theirs: Mapping[str, np.ndarray]
) -> list[Row]:
    """How many windows (features and label of the sample's row) differ from Qlib's."""
    view = view_of_frame(frame)
    table = []
    for name, (start, end) in segments.items():
        dates = pd.DatetimeIndex(theirs[f"{name}/date"]).as_unit("ns")
        index = pd.MultiIndex.from_arrays([dates, theirs[f"{name}/instrument"].astype(str)])
        for fill in FILLS:
            samples = build_samples(view, start=start, end=end, step_len=step_len, fill=fill)
            at = index.get_indexer(samples.index)
            if len(index) != len(samples) or (at < 0).any():
                raise RuntimeError(f"{name}: {len(samples)} samples, Qlib has {len(index)}")
            different = 0
            for rows in torch.arange(len(samples)).split(8192):
                batch = samples.batch(rows)
                their = torch.from_numpy(theirs[f"{name}/{fill}"][at[rows.numpy()]])
                assert batch.y is not None
                wrong = ~_equal(batch.x, their[:, :, :-1]).flatten(1).all(1)
                wrong |= ~_equal(batch.y[:, 0], their[:, -1, -1])
                different += int(wrong.sum())
            table.append(Row(name, fill, len(samples), different))
    return table


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def provider_frame(provider_uri: str) -> pd.DataFrame:
    """The rows of a Qlib folder, numbered."""
    from qtorch.data.source.qlib import QlibSource

    panel: Panel = QlibSource(provider_uri).load(["close"])
    index = panel.to_frame().index
    assert isinstance(index, pd.MultiIndex)
    return numbered(index, np.random.default_rng(0))


def main() -> int:
    """Print the table; 1 where any window differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--provider-uri")
    parser.add_argument("--python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument("--step-len", type=int, default=20)
    asked = parser.parse_args()
    if not asked.python:
        parser.error("name a Python with pyqlib by --python or QTORCH_QLIB_PYTHON")
    frame = provider_frame(asked.provider_uri) if asked.provider_uri else stress_frame()
    dates = frame.index.get_level_values("datetime").unique().sort_values()
    cut = [str(dates[int(len(dates) * share)].date()) for share in (0, 0.7, 0.8)]
    after = [str(dates[int(len(dates) * share) - 1].date()) for share in (0.7, 0.8, 1.0)]
    segments = dict(zip(("train", "valid", "test"), zip(cut, after, strict=True), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        theirs = qlib_windows(frame, segments, asked.step_len, asked.python, Path(folder))
    table = compare(frame, segments, asked.step_len, theirs)
    print(f"{'segment':8} {'fill':12} {'windows':>9} {'different':>9}")
    for row in table:
        print(f"{row.segment:8} {row.fill:12} {row.windows:9,} {row.different:9,}")
    return int(any(row.different for row in table))


if __name__ == "__main__":
    sys.exit(main())
