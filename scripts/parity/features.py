"""qtorch's expressions against real Qlib's: the table of agreement.

    compare(panel, qlib_npz, expressions) -> list[Row]

Qlib's numbers come from `qlib_features.py`, which `ask_qlib` starts under a Python with pyqlib.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from qtorch.data.expression.evaluation import evaluate
from qtorch.data.panel import Panel

RELATIVE, OF_SCALE, SHARE = 1e-4, 1e-6, 0.9999
"""|ours - Qlib's| <= RELATIVE |Qlib's| + OF_SCALE x scale, in SHARE of the cells."""


@dataclass(frozen=True)
class Row:
    """One column's agreement: cells, the share that agrees, differing NaNs, the worst excess.

    `flat` counts the declared difference on windows without any movement: exactly 0 here, Qlib's
    rounding there (under 1e-5, or over 1e5 where it was divided by 1e-12).
    """

    name: str
    cells: int
    agree: float
    other_nan: int
    outside: int
    flat: int
    worst: float

    @property
    def passes(self) -> bool:
        return self.agree >= SHARE

    def __str__(self) -> str:
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.name[:60]:60} {self.cells:9d} {100 * self.agree:9.4f}% nan {self.other_nan:5d} "
            f"outside {self.outside:5d} flat {self.flat:4d} worst {self.worst:9.2e} {mark}"
        )


def ask_qlib(
    python: str, provider: Path | str, expressions: Sequence[str] | str, *, kernels: int = 1
) -> dict[str, np.ndarray]:
    """Real Qlib's values of expressions ("alpha158" and "alpha360" too) over a provider folder."""
    script = Path(__file__).with_name("qlib_features.py")
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder) / "wanted.json", Path(folder) / "out.npz"
        wanted.write_text(
            json.dumps(expressions if isinstance(expressions, str) else [*expressions])
        )
        subprocess.run(
            [python, str(script), str(provider), str(wanted), str(out), str(kernels)],
            check=True,
            capture_output=True,
            text=True,
        )
        with np.load(out) as found:
            return {key: found[key] for key in found.files}


def compare(bars: Panel, qlib: dict[str, np.ndarray], *, columns_at_once: int = 40) -> list[Row]:
    """Compare every column of Qlib's answer with ours over the same bars."""
    instruments = pd.Index([i.lower() for i in bars.instruments])
    at = instruments.get_indexer(pd.Index(qlib["instrument"]).str.lower())
    rows = bars.calendar.get_indexer(pd.DatetimeIndex(qlib["datetime"]))
    if (at < 0).any() or (rows < 0).any():
        raise ValueError("Qlib answered for rows that the bars lack")
    table = []
    names = [str(n) for n in qlib["names"]]
    expressions = [str(e) for e in qlib["expressions"]]
    for begin in range(0, len(names), columns_at_once):
        part = slice(begin, begin + columns_at_once)
        ours = evaluate(dict(zip(names[part], expressions[part], strict=True)), bars)
        for k, name in enumerate(names[part]):
            column = ours.values[:, :, k].cpu().numpy()[rows, at]
            table.append(compare_column(name, column, qlib["values"][:, begin + k]))
    return table


def compare_column(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """One column; its scale is the deviation of Qlib's finite values."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(theirs)
    scale = float(theirs[finite].std()) if finite.any() else 0.0
    same_nan = np.isnan(ours) == np.isnan(theirs)
    allowed = RELATIVE * np.abs(theirs) + OF_SCALE * scale
    with np.errstate(invalid="ignore"):
        outside = ~(np.abs(ours - theirs) <= allowed) & (ours != theirs)
    infinite = np.isinf(ours) | np.isinf(theirs)
    outside = same_nan & ~np.isnan(ours) & (outside | (infinite & (ours != theirs)))
    flat = outside & (ours == 0) & ((np.abs(theirs) < 1e-5) | (np.abs(theirs) > 1e5))
    outside &= ~flat
    agree = same_nan & ~outside
    worst = float(np.abs(ours - theirs)[outside].max()) if outside.any() else 0.0
    counts = (int((~same_nan).sum()), int(outside.sum()), int(flat.sum()))
    return Row(name, len(ours), float(agree.mean()), *counts, worst)
