"""Named tensors that accompany each sample besides its features, e.g. concept memberships."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.dates import date_rows
from qtorch.core.errors import ConfigError
from qtorch.core.tables import as_pandas, is_frame
from qtorch.core.trust import trust_subclasses
from qtorch.data.panel.column_names import INSTRUMENT_COLUMNS
from qtorch.data.panel.spans import read_spans

RESERVED = ("raw_label", "instrument", "date")
CONCEPT_COLUMNS = ("concept", "industry", "sector", "theme", "group")


class Gatherable(ABC):
    """A tensor for each (date row, instrument column), on a device."""

    @abstractmethod
    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        """Return `[B, ...]` for int64 `[B]` each; values of a date were known on that date."""

    @abstractmethod
    def to(self, device: torch.device) -> Gatherable:
        """Return a copy on another device."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The size of the last dimension of `gather`'s result."""


@trust_subclasses
class Extra(Configured, ABC):
    """Base class of the objects in a dataset's `extras={name: ...}`; it is bound to a calendar.

    A network that lists `name` in its `extras` receives the tensor as a keyword argument.
    """

    @abstractmethod
    def bind(self, calendar: pd.DatetimeIndex, instruments: pd.Index) -> Gatherable:
        """Build the tensor for the rows of a calendar and the columns of instruments."""


class Concepts(Extra):
    """The concepts (industries, themes, indices) that an instrument belonged to on a date.

    `table`: a DataFrame or a parquet or CSV file with one row per membership: `instrument`,
    `concept`, and optionally `start` and `end` (inclusive dates; a missing date, and a year such as
    that of 9999-12-31, is open). The usual spellings of these columns are found too. Returns
    `[B, K]` float32 of 0 and 1 for the K concepts of `names`, as of the sample's date without
    look-ahead. Instruments without rows belong to no concept; rows of unknown instruments are
    ignored.
    """

    def __init__(self, table: pd.DataFrame | str | Path) -> None:
        self.table = table

    def memberships(self) -> pd.DataFrame:
        """Return the table: instrument, concept, start and end (NaT is open)."""
        return _read_memberships(self.table)

    def bind(self, calendar: pd.DatetimeIndex, instruments: pd.Index) -> Gatherable:
        frame = self.memberships()
        names = sorted(frame["concept"].unique())
        frame = frame[frame["instrument"].isin(instruments)]
        instrument_index = torch.as_tensor(instruments.get_indexer(pd.Index(frame["instrument"])))
        concept_index = torch.as_tensor(pd.Index(names).get_indexer(pd.Index(frame["concept"])))
        rows = [
            date_rows(calendar, *(None if pd.isna(date) else date for date in dates))
            for dates in zip(frame["start"], frame["end"], strict=True)
        ]
        spans = torch.tensor([(r.start, r.stop) for r in rows], dtype=torch.int64).reshape(-1, 2)
        return BoundConcepts(tuple(names), len(instruments), instrument_index, concept_index, spans)


class BoundConcepts(Gatherable):
    """Membership spans by instrument: `[N, J, 3]`, concept, first row and last row.

    J is the largest number of spans that an instrument has. The last row of an empty span is -1.
    """

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
        slot = torch.arange(len(instrument)) - (counts.cumsum(0) - counts)[instrument]
        max_spans = max(1, int(counts.max()) if len(counts) else 0)
        first, stop = spans.unbind(1)
        last = torch.where(first < stop, stop - 1, -1)
        # Unused spans are empty.
        self.spans = torch.tensor((0, 0, -1)).expand(num_instruments, max_spans, -1).clone()
        self.spans[instrument, slot] = torch.stack((concept, first, last), 1)

    @property
    def width(self) -> int:
        return len(self.names)

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        concept, first, last = self.spans[instrument].unbind(-1)  # [B, J] each
        date = date[:, None]
        # A date inside a span is not moved by its limits. An empty span moves it to row -1.
        inside = date.clamp(first, last) == date
        out = torch.zeros(len(date), self.width, device=date.device)
        # Spans of one concept normally do not overlap; amax keeps 1 if a table repeats one.
        return out.scatter_reduce_(1, concept, inside.float(), "amax")

    def to(self, device: torch.device) -> Gatherable:
        copy = object.__new__(BoundConcepts)
        copy.names = self.names
        copy.spans = self.spans.to(device)
        return copy


def check_extras(extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a dataset's `extras`; raise ConfigError for a reserved name or another form."""
    if extras is not None and not isinstance(extras, Mapping):
        raise ConfigError(f"extras is {extras!r:.80}; expected a mapping of names to extras.")
    for name in extras or {}:
        if name in RESERVED:
            raise ConfigError(
                f"an extra cannot be named {name!r}: the name is reserved for batches."
            )
    return dict(extras or {})


def _read_memberships(table: Any) -> pd.DataFrame:
    """Return the columns instrument, concept, start and end; an open start or end is NaT."""
    if not isinstance(table, str | Path):
        if not is_frame(table):
            kind = type(table).__name__
            raise ConfigError(f"concepts must be a DataFrame or a file, got a {kind}.")
        table = as_pandas(table)
    names = {"instrument": INSTRUMENT_COLUMNS, "concept": CONCEPT_COLUMNS}
    frame = read_spans(table, names, kind="concept table")
    frame["start"] = frame["start"].where(frame["start"] != pd.Timestamp.min)
    frame["end"] = frame["end"].where(frame["end"] != pd.Timestamp.max)
    frame["end"] = frame["end"].dt.normalize()  # the end is a whole day
    return frame
