"""Small markets that one can follow by hand."""

from __future__ import annotations

import pandas as pd

from qtorch.data.source.frame import FrameSource


def bars(close, **fields):
    """A source of a table of closes (rows are days from 2020-01-01 on, columns instruments).

    Other fields are tables too; open, high, low and vwap are the close, volume a million, factor
    1, unless given.
    """
    close = pd.DataFrame(close, dtype=float)
    close.index = pd.bdate_range("2020-01-01", periods=len(close), name="datetime")
    close.columns.name = "instrument"
    filled = {"volume": 1e6 + 0 * close, "factor": 1.0 + 0 * close, "open": close}
    for name, table in fields.items():
        filled[name] = pd.DataFrame(table, dtype=float).set_axis(close.index)
        filled[name].columns.name = "instrument"
    long = {"close": close, **filled}
    frame = pd.concat({k: v.stack() for k, v in long.items()}, axis=1).sort_index()
    return FrameSource(frame)


def score_table(table, index):
    """Scores of a table with the dates of `index` as a series by (datetime, instrument)."""
    frame = pd.DataFrame(table, dtype=float)
    frame.index = index[: len(frame)]
    frame.columns.name, frame.index.name = "instrument", "datetime"
    return frame.stack().rename("score")
