"""Read CSV files that contain names, such as instruments."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

# pandas' own list; to treat some columns differently, it must be passed for the others.
MISSING_VALUES = [
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
]


def read_csv(path: str | Path, name_columns: Iterable[str | int | tuple[str, ...]]) -> pd.DataFrame:
    """Read a CSV file; the values of `name_columns` stay text as written.

    An instrument may be called NA, null or 000001, so in these columns only an empty cell is
    missing. Each is a column's name, its position, or a tuple of names, of which the first that
    the file has is meant. Columns that the file does not have are ignored.
    """
    columns = list(pd.read_csv(path, nrows=0).columns)
    names = set()
    for column in name_columns:
        if isinstance(column, int):
            names.add(columns[column])
        else:
            alternatives = (column,) if isinstance(column, str) else column
            names.update([c for c in alternatives if c in columns][:1])
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(names, str),
        keep_default_na=False,
        na_values={column: [""] if column in names else MISSING_VALUES for column in columns},
    )
