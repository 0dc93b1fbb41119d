"""Tables of membership spans: which instrument belongs to what, from when to when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from qtorch.core.dates import date_texts, parse_span_dates
from qtorch.core.errors import DataError
from qtorch.core.session import resolve_path
from qtorch.core.tables import find_column, index_to_columns, read_table, text_names
from qtorch.data.panel.column_names import END_COLUMNS, START_COLUMNS

START, END = "start", "end"


def read_spans(
    table: pd.DataFrame | str | Path,
    names: Mapping[str, Sequence[str]],
    *,
    kind: str,
    date_format: str | None = None,
) -> pd.DataFrame:
    """Read a frame or file with one row per span: columns of names, and `start` and `end`.

    `names` are the columns of the result with their usual spellings; their values are text as
    written. Dates are inclusive; a missing one, or a year that no Timestamp holds, such as that of
    9999-12-31, is open (the first or last Timestamp), as is a column that the table does not have.
    `kind` describes the table in errors. Raises DataError for a missing file, column or name.
    """
    spellings = {**names, START: START_COLUMNS, END: END_COLUMNS}
    location = f"the {kind}"
    if isinstance(table, pd.DataFrame):
        table = index_to_columns(table)
    else:
        path = resolve_path(table)
        if not path.is_file():
            raise DataError(f"there is no {kind} file {path}.")
        table, location = read_table(path, spellings.values()), str(path)
    columns = {name: find_column(table.columns, spellings[name]) for name in spellings}
    missing = [name for name in names if columns[name] is None]
    if missing:
        raise DataError(
            f"{location}: the columns {' and '.join(names)} are required (start and end are "
            f"optional); {missing} are missing, the table has {list(table.columns)}."
        )
    spans = pd.DataFrame(index=table.index)
    for name in names:
        values = table[columns[name]]
        if values.isna().any():
            raise DataError(f"{location}: a row has no {name}.")
        spans[name] = text_names(values)
    context = [
        t for name in (START, END) if columns[name] for t in date_texts(table[columns[name]])
    ]
    for name in (START, END):
        column = columns[name]
        values = pd.Series(None, table.index, dtype=object) if column is None else table[column]
        try:
            spans[name] = parse_span_dates(
                values, is_end=name == END, date_format=date_format, context=context
            )
        except DataError as error:
            raise DataError(f"{location}, column {column!r}: {error}") from error
    return spans
