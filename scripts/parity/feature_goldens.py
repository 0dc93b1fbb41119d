"""Make tests/golden/features.npz: what real Qlib computes on a small stress market.

    python -m scripts.parity.feature_goldens PYTHON_WITH_PYQLIB OUT.npz

The bars are stored too, so a test needs neither Qlib nor the generator. Each column keeps every
fourth row, beginning at another one, to stay small.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parity.expressions import operator_expressions
from parity.features import ask_qlib
from parity.stress import stress_market

from qtorch.data.source.qlib_writer import write_qlib

EVERY = 4


def main(python: str, out: str) -> None:
    bars = stress_market(8, 120, seed=3)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        provider = write_qlib(bars, Path(folder) / "market")
        for name, wanted in (
            ("operators", operator_expressions()),
            ("alpha158", "alpha158"),
            ("alpha360", "alpha360"),
        ):
            parts[name] = ask_qlib(python, provider, wanted)
    stored = {
        "bars": bars.values.numpy(),
        "calendar": bars.calendar.asi8,
        "instruments": np.array(bars.instruments.tolist()),
        "fields": np.array(bars.fields),
        "spans": bars.spans.numpy(),
    }
    for name, found in parts.items():
        keep = range(0, len(found["names"]), 15 if name == "alpha360" else 1)
        columns = [found["values"][k % EVERY :: EVERY, k] for k in keep]
        rows = bars.calendar.asi8.searchsorted(found["datetime"])
        stored[f"{name}_row"] = rows.astype(np.int16)
        names = np.char.upper(found["instrument"]).tolist()
        stored[f"{name}_instrument"] = bars.instruments.get_indexer(names).astype(np.int16)
        stored[f"{name}_names"] = found["names"]
        stored[f"{name}_expressions"] = found["expressions"]
        stored[f"{name}_kept"] = np.array(keep)
        stored[f"{name}_lengths"] = np.array([len(c) for c in columns])
        stored[f"{name}_values"] = np.concatenate(columns)
    np.savez_compressed(out, **stored)
    print(f"{out}: {Path(out).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
