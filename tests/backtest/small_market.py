"""Small markets whose backtests can be checked by hand."""

from __future__ import annotations

import pandas as pd

from qtorch.data.source.frame import FrameSource


def bars(close, **fields):
    """Build a source from a table of closes (rows: days from 2020-01-01; columns: instruments).

    Other fields are tables of the same shape. By default open is the close, volume is one million
    and factor is 1.
    """
    close = pd.DataFrame(close, dtype=float)
    close.index = pd.bdate_range("2020-01-01", periods=len(close), name="datetime")
    close.columns.name = "instrument"
    all_fields = {"volume": 1e6 + 0 * close, "factor": 1.0 + 0 * close, "open": close}
    for name, table in fields.items():
        all_fields[name] = pd.DataFrame(table, dtype=float).set_axis(close.index)
        all_fields[name].columns.name = "instrument"
    tables = {"close": close, **all_fields}
    frame = pd.concat({k: v.stack() for k, v in tables.items()}, axis=1).sort_index()
    return FrameSource(frame)


def score_table(table, index):
    """Turn a table of scores into a series by (datetime, instrument), with the dates of `index`."""
    frame = pd.DataFrame(table, dtype=float)
    frame.index = index[: len(frame)]
    frame.columns.name, frame.index.name = "instrument", "datetime"
    return frame.stack().rename("score")
