"""Compare the values of qtorch's expressions with Qlib's.

    compare(panel, qlib_npz) -> list[Row]

Qlib's values come from `qlib_features.py`, which `ask_qlib` runs with a Python that has pyqlib.
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
from qtorch.data.panel.panel import Panel

RELATIVE, OF_SCALE, SHARE = 1e-4, 1e-6, 0.9999
"""Pass if |qtorch - Qlib| <= RELATIVE |Qlib| + OF_SCALE x scale in the fraction SHARE of cells."""


@dataclass(frozen=True)
class Row:
    """The agreement of one column: cells, fraction in agreement, differing NaN, worst difference.

    `flat` counts cells with an accepted difference on windows of constant values: qtorch returns
    exactly 0, Qlib its rounding error (under 1e-5, or over 1e5 if divided by 1e-12).
    """

    name: str
    cells: int
    agree: float
    differing_nan: int
    outside: int
    flat: int
    worst: float

    @property
    def passes(self) -> bool:
        return self.agree >= SHARE

    def __str__(self) -> str:
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.name[:60]:60} {self.cells:9d} {100 * self.agree:9.4f}% "
            f"nan {self.differing_nan:5d} outside {self.outside:5d} flat {self.flat:4d} "
            f"worst {self.worst:9.2e} {mark}"
        )


def ask_qlib(
    python: str, provider: Path | str, expressions: Sequence[str] | str, *, kernels: int = 1
) -> dict[str, np.ndarray]:
    """Qlib's values of expressions (or "alpha158", "alpha360") on the bars of a provider folder."""
    script = Path(__file__).with_name("qlib_features.py")
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "wanted.json", Path(folder) / "out.npz"
        request.write_text(
            json.dumps(expressions if isinstance(expressions, str) else [*expressions])
        )
        subprocess.run(
            [python, str(script), str(provider), str(request), str(out), str(kernels)],
            check=True,
            capture_output=True,
            text=True,
        )
        with np.load(out) as arrays:
            return {key: arrays[key] for key in arrays.files}


def compare(bars: Panel, qlib: dict[str, np.ndarray], *, columns_at_once: int = 40) -> list[Row]:
    """Compare every column of Qlib's values with qtorch's on the same bars."""
    instruments = pd.Index([i.lower() for i in bars.instruments])
    columns = instruments.get_indexer(pd.Index(qlib["instrument"]).str.lower())
    rows = bars.calendar.get_indexer(pd.DatetimeIndex(qlib["datetime"]))
    if (columns < 0).any() or (rows < 0).any():
        raise ValueError("Qlib returned rows that are not in the bars")
    table = []
    names = [str(n) for n in qlib["names"]]
    expressions = [str(e) for e in qlib["expressions"]]
    for begin in range(0, len(names), columns_at_once):
        part = slice(begin, begin + columns_at_once)
        values = evaluate(dict(zip(names[part], expressions[part], strict=True)), bars)
        for k, name in enumerate(names[part]):
            column = values.values[:, :, k].cpu().numpy()[rows, columns]
            table.append(compare_column(name, column, qlib["values"][:, begin + k]))
    return table


def compare_column(name: str, values: np.ndarray, qlib_values: np.ndarray) -> Row:
    """Compare one column; its scale is the standard deviation of Qlib's finite values."""
    values, qlib_values = values.astype(np.float64), qlib_values.astype(np.float64)
    finite = np.isfinite(qlib_values)
    scale = float(qlib_values[finite].std()) if finite.any() else 0.0
    same_nan = np.isnan(values) == np.isnan(qlib_values)
    tolerance = RELATIVE * np.abs(qlib_values) + OF_SCALE * scale
    with np.errstate(invalid="ignore"):
        is_outside = ~(np.abs(values - qlib_values) <= tolerance) & (values != qlib_values)
    infinite = np.isinf(values) | np.isinf(qlib_values)
    is_outside = same_nan & ~np.isnan(values) & (is_outside | (infinite & (values != qlib_values)))
    is_flat = (
        is_outside & (values == 0) & ((np.abs(qlib_values) < 1e-5) | (np.abs(qlib_values) > 1e5))
    )
    is_outside &= ~is_flat
    agrees = same_nan & ~is_outside
    worst = float(np.abs(values - qlib_values)[is_outside].max()) if is_outside.any() else 0.0
    counts = (int((~same_nan).sum()), int(is_outside.sum()), int(is_flat.sum()))
    return Row(name, len(values), float(agrees.mean()), *counts, worst)
