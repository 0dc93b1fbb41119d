"""Named tensors that go with each sample beside its features: memberships in concepts, say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.dates import first_row
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.trust import trusted_type

RESERVED = ("raw_label", "instrument", "date")


class Gatherable(ABC):
    """A tensor for each (date row, instrument column), on a device."""

    @abstractmethod
    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        """`[B, ...]` for int64 `[B]` each; what it gives for a date was known on that date."""

    @abstractmethod
    def to(self, device: torch.device) -> Gatherable:
        """The same on another device."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The last axis of what `gather` gives."""


@trusted_type
class Extra(Configured, ABC):
    """What a dataset's `extras={name: ...}` holds: something that is bound to a calendar.

    A network that lists `name` among its `extras` is given the tensor by keyword.
    """

    @abstractmethod
    def bind(self, calendar: pd.DatetimeIndex, instruments: pd.Index) -> Gatherable:
        """The tensor for the rows of a calendar and the columns of instruments."""


class Concepts(Extra):
    """Which concepts (industries, themes, indices) an instrument belonged to on a date.

    `table`: a DataFrame or a parquet or CSV file, one row a membership: `instrument`, `concept`,
    and if they are limited `start` and `end` (inclusive dates; missing is open). Gives `[B, K]`
    float32 of 0 and 1, K concepts in the order of `names`: as of the sample's date, nothing of
    the future. Instruments without any row belong to none; rows of unknown ones are ignored.
    """

    def __init__(self, table: pd.DataFrame | str | Path) -> None:
        self.table = table

    def bind(self, calendar: pd.DatetimeIndex, instruments: pd.Index) -> Gatherable:
        frame = _memberships(self.table)
        names = sorted(frame["concept"].unique())
        frame = frame[frame["instrument"].isin(instruments)]
        who = torch.as_tensor(instruments.get_indexer(pd.Index(frame["instrument"])))
        what = torch.as_tensor(pd.Index(names).get_indexer(pd.Index(frame["concept"])))
        spans = torch.tensor(
            [
                (
                    0 if pd.isna(start) else first_row(calendar, start),
                    # The first row behind the end: an end is a whole day.
                    len(calendar) if pd.isna(end) else first_row(calendar, _next_day(end)),
                )
                for start, end in zip(frame["start"], frame["end"], strict=True)
            ],
            dtype=torch.int64,
        ).reshape(-1, 2)
        return BoundConcepts(tuple(names), len(instruments), who, what, spans)


class BoundConcepts(Gatherable):
    """Membership spans by instrument: `[N, J]` concept and `[N, J, 2]` rows, J the most that one
    instrument has."""

    def __init__(
        self,
        names: tuple[str, ...],
        num_instruments: int,
        instrument: Tensor,
        concept: Tensor,
        spans: Tensor,
    ) -> None:
        self.names = names
        order = torch.argsort(instrument, stable=True)
        instrument, concept, spans = instrument[order], concept[order], spans[order]
        counts = torch.bincount(instrument, minlength=num_instruments)
        place = torch.arange(len(instrument)) - (counts.cumsum(0) - counts)[instrument]
        most = max(1, int(counts.max()) if len(counts) else 0)
        self.concept = torch.zeros(num_instruments, most, dtype=torch.int64)
        self.spans = torch.zeros(num_instruments, most, 2, dtype=torch.int64)  # none: start = end
        self.concept[instrument, place] = concept
        self.spans[instrument, place] = spans

    @property
    def width(self) -> int:
        return len(self.names)

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        spans = self.spans[instrument]  # [B, J, 2]
        inside = (date[:, None] >= spans[..., 0]) & (date[:, None] < spans[..., 1])
        out = torch.zeros(len(date), self.width, device=date.device)
        # Two spans of one concept do not meet on a date; where a table doubles one, it is 1.
        return out.scatter_reduce_(1, self.concept[instrument], inside.float(), "amax")

    def to(self, device: torch.device) -> Gatherable:
        moved = object.__new__(BoundConcepts)
        moved.names = self.names
        moved.concept, moved.spans = self.concept.to(device), self.spans.to(device)
        return moved


def check_extras(extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dataset's `extras` with names that are free."""
    for name in extras or {}:
        if name in RESERVED:
            raise ConfigError(f"an extra cannot be named {name!r}: every batch has that itself.")
    return dict(extras or {})


def _memberships(table: Any) -> pd.DataFrame:
    if isinstance(table, str | Path):
        path = Path(table)
        if not path.exists():
            raise DataError(f"no file {path} of concept memberships.")
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if not isinstance(table, pd.DataFrame):
        raise ConfigError(f"concepts are a DataFrame or a file, got a {type(table).__name__}.")
    missing = [c for c in ("instrument", "concept") if c not in table]
    if missing:
        raise DataError(
            f"a table of concepts has the columns instrument, concept (start, end); it lacks "
            f"{missing} and has {list(table.columns)}."
        )
    frame = table.reindex(columns=["instrument", "concept", "start", "end"])
    if frame[["instrument", "concept"]].isna().any(axis=None):
        raise DataError("a membership lacks its instrument or its concept.")
    for side in ("start", "end"):
        frame[side] = pd.to_datetime(frame[side])
    frame["concept"] = frame["concept"].astype(str)
    return frame


def _next_day(date: Any) -> pd.Timestamp:
    return pd.Timestamp(date).normalize() + pd.Timedelta(days=1)
