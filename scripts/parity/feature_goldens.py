"""Write tests/golden/features.npz: Qlib's feature values on a small stress market.

    python -m scripts.parity.feature_goldens PYTHON_WITH_PYQLIB OUT.npz

The bars are stored as well, so that the test needs neither Qlib nor the generator. To keep the
file small, each column stores every fourth row, with a different start per column.
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

from qtorch.data.source.writer import write_qlib

EVERY = 4


def main(python: str, out: str) -> None:
    bars = stress_market(8, 120, seed=3)
    results_by_part = {}
    with tempfile.TemporaryDirectory() as folder:
        provider = write_qlib(bars, Path(folder) / "market")
        for name, expressions in (
            ("operators", operator_expressions()),
            ("alpha158", "alpha158"),
            ("alpha360", "alpha360"),
        ):
            results_by_part[name] = ask_qlib(python, provider, expressions)
    arrays = {
        "bars": bars.values.numpy(),
        "calendar": bars.calendar.asi8,
        "instruments": np.array(bars.instruments.tolist()),
        "fields": np.array(bars.fields),
        "spans": bars.spans.numpy(),
    }
    for name, results in results_by_part.items():
        kept_columns = range(0, len(results["names"]), 15 if name == "alpha360" else 1)
        columns = [results["values"][k % EVERY :: EVERY, k] for k in kept_columns]
        rows = bars.calendar.asi8.searchsorted(results["datetime"])
        arrays[f"{name}_row"] = rows.astype(np.int16)
        names = np.char.upper(results["instrument"]).tolist()
        arrays[f"{name}_instrument"] = bars.instruments.get_indexer(names).astype(np.int16)
        arrays[f"{name}_names"] = results["names"]
        arrays[f"{name}_expressions"] = results["expressions"]
        arrays[f"{name}_kept"] = np.array(kept_columns)
        arrays[f"{name}_lengths"] = np.array([len(c) for c in columns])
        arrays[f"{name}_values"] = np.concatenate(columns)
    np.savez_compressed(out, **arrays)
    print(f"{out}: {Path(out).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
