"""The data on which Qlib's faults show: eleven rows that can be worked through by hand."""

from __future__ import annotations

import pandas as pd

# Where score and label are equal, three samples: a perfect prediction; and their mean.
LABELS = [1.0, 2.0, 3.0]
SCORES = {"perfect": [1.0, 2.0, 3.0], "constant": [2.0, 2.0, 2.0]}
SEGMENT = ("2024-01-01", "2024-01-04")
STEP_LEN, BATCH_SIZE = 2, 4


def fault_frame() -> pd.DataFrame:
    """Four days of the instruments A, B and C; B has no bar on the second."""
    days = pd.date_range(*SEGMENT, freq="D")
    index = pd.MultiIndex.from_product([days, ["A", "B", "C"]], names=["datetime", "instrument"])
    index = index.drop((days[1], "B"))
    rows = [float(k) for k in range(len(index))]
    return pd.DataFrame(
        {("feature", "ROW"): rows, ("label", "LABEL0"): [k / 10 for k in rows]}, index=index
    )


def shown(index: pd.MultiIndex) -> list[str]:
    """Rows as "day instrument", such as "2 A"."""
    return [f"{date.day} {instrument}" for date, instrument in index]
