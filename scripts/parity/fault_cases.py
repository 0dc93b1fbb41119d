"""Test data that reveals Qlib's faults: eleven rows that can be checked by hand."""

from __future__ import annotations

import pandas as pd

# Labels of three samples, a perfect prediction, and the constant prediction of their mean.
LABELS = [1.0, 2.0, 3.0]
SCORES = {"perfect": [1.0, 2.0, 3.0], "constant": [2.0, 2.0, 2.0]}
SEGMENT = ("2024-01-01", "2024-01-04")
STEP_LEN, BATCH_SIZE = 2, 4


def fault_frame() -> pd.DataFrame:
    """Four days of the instruments A, B and C; B has no bar on the second day."""
    days = pd.date_range(*SEGMENT, freq="D")
    index = pd.MultiIndex.from_product([days, ["A", "B", "C"]], names=["datetime", "instrument"])
    index = index.drop((days[1], "B"))
    rows = [float(k) for k in range(len(index))]
    return pd.DataFrame(
        {("feature", "ROW"): rows, ("label", "LABEL0"): [k / 10 for k in rows]}, index=index
    )


def row_labels(index: pd.MultiIndex) -> list[str]:
    """Label each row by day of the month and instrument, such as "2 A"."""
    return [f"{date.day} {instrument}" for date, instrument in index]
