"""ConceptMatrix: the concepts of HIST in Qlib's files, a matrix and the row of each instrument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError, TrustError
from qtorch.core.session import resolve_path, trusts_pickles
from qtorch.core.tables import read_csv
from qtorch.data.dataset.extras import Extra, Gatherable


class ConceptMatrix(Extra):
    """The concepts that each instrument belongs to, the same on every date.

    `stock2concept`: an `.npy` file with a matrix `[rows, K]` of 0 and 1. `stock_index`: the row of
    each instrument: a CSV or Parquet file with the columns `instrument` and `row`, or Qlib's `.npy`
    file with a dict. Such a file is a pickle and needs trust (`trusted_pickle=true`). The last row
    is for instruments that have none.

    The memberships are those of the day on which the files were written, so that they know the
    future of earlier dates; `qtorch.data.Concepts` has dates. Corresponds to pytorch_hist.py.
    """

    def __init__(self, stock2concept: str | Path, stock_index: str | Path) -> None:
        self.stock2concept, self.stock_index = stock2concept, stock_index

    def bind(self, calendar: pd.DatetimeIndex, instruments: pd.Index) -> Gatherable:
        matrix = np.load(_require_file(self.stock2concept, "stock2concept"))
        rows = _read_rows(_require_file(self.stock_index, "stock_index"))
        last = len(matrix) - 1
        index = [rows.get(str(name), last) for name in instruments]
        if max(index, default=0) > last:
            raise DataError(
                f"{self.stock_index} names row {max(index)}, but {self.stock2concept} has "
                f"{last + 1} rows."
            )
        return BoundMatrix(torch.as_tensor(matrix[index], dtype=torch.float32))


class BoundMatrix(Gatherable):
    """A row of values `[N, K]` for each instrument, whatever the date."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        return self.values[instrument]

    def to(self, device: torch.device) -> BoundMatrix:
        return BoundMatrix(self.values.to(device))


def _require_file(path: str | Path, name: str) -> Path:
    full = resolve_path(path)
    if not full.is_file():
        raise DataError(f"{name}: there is no file {str(full)!r}.")
    return full


def _read_rows(path: Path) -> dict[str, int]:
    """Read the row of each instrument."""
    if path.suffix == ".npy":
        if not trusts_pickles():
            raise TrustError(
                f"{path}: this is a pickle, and loading a pickle runs the code that its author "
                "put into it. If you trust its author, add trusted_pickle=true to the command (in "
                "Python qtorch.init(trusted_pickle=True)), or write it as a CSV file with the "
                "columns instrument and row."
            )
        table: Any = np.load(path, allow_pickle=True).item()
        return {str(name): int(row) for name, row in table.items() if not pd.isna(row)}
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else read_csv(path, ["instrument"])
    missing = [name for name in ("instrument", "row") if name not in frame]
    if missing:
        raise DataError(
            f"{path} has no column {' and '.join(missing)}; its columns are {[*frame]}."
        )
    return dict(zip(frame["instrument"].astype(str), frame["row"].astype(int), strict=True))
