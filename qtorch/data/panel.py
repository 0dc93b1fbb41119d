"""The panel: bars or features of all instruments on all days, as one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import date_rows
from qtorch.core.errors import DataError, unknown_name

NAMES = ("datetime", "instrument")


def normalise_calendar(dates: Any) -> pd.DatetimeIndex:
    """Dates as a naive `datetime64[ns]` index named "datetime"; time zones are refused.

    Raises DataError for time-zone-aware dates (which day is meant?) and for values that are
    no dates.
    """
    try:
        index = pd.DatetimeIndex(dates)
    except (ValueError, TypeError) as error:
        if "Mixed timezones" in str(error):  # text with offsets, on both sides of a summer time
            raise DataError(_aware("several time zones")) from error
        raise DataError(f"the dates cannot be read as dates: {error}") from error
    if index.tz is not None:
        raise DataError(_aware(f"the time zone {index.tz}"))
    return index.as_unit("ns").rename(NAMES[0])


def _aware(zone: str) -> str:
    return (
        f"the dates carry {zone}; qtorch works on naive local session dates. Mend it with "
        "df.index.tz_convert(market_zone).tz_localize(None) for the zone whose midnight separates "
        "your sessions (text with offsets: pd.to_datetime(text, utc=True) first)."
    )


class Panel:
    """`[D, N, F]` float32 values with a calendar, instruments and field names.

    NaN is "no bar". `mask [D, N]` says which rows belong to the universe that day: a row that
    exists for a sample or a cross-section. `spans [N, 2]` holds each instrument's first and last
    stored calendar row, both inclusive (`(0, -1)` where it has none): between them a NaN is a
    suspended day, outside them there is nothing, and the two differ for rolling windows.

    `values` may have any strides: sources and the expression engine write field-major storage
    (a whole column is contiguous), datasets read instrument-major storage (a window is
    contiguous). Both are views of the same shape here.
    """

    def __init__(
        self,
        values: Tensor,
        calendar: Any,
        instruments: Sequence[str] | pd.Index,
        fields: Sequence[str],
        *,
        mask: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> None:
        self.values = values
        self.calendar = normalise_calendar(calendar)
        self.instruments = pd.Index([str(i) for i in instruments], name=NAMES[1], dtype="str")
        self.fields = tuple(str(f) for f in fields)
        self._check_shapes()
        self._position = {f: k for k, f in enumerate(self.fields)}
        self.spans = spans if spans is not None else _spans_of(values)
        self.mask = mask if mask is not None else within_spans(self.spans, len(self.calendar))

    def _check_shapes(self) -> None:
        expected = (len(self.calendar), len(self.instruments), len(self.fields))
        if tuple(self.values.shape) != expected:
            raise DataError(
                f"panel values have shape {tuple(self.values.shape)}, but calendar, instruments "
                f"and fields say {expected} (dates, instruments, fields)."
            )
        if not (self.calendar.is_monotonic_increasing and self.calendar.is_unique):
            raise DataError("the calendar must hold each date once, in ascending order.")
        for what, names in (("instrument", self.instruments), ("field", pd.Index(self.fields))):
            if not names.is_unique:
                twice = names[names.duplicated()].unique().tolist()[:5]
                raise DataError(f"each {what} may stand once; given twice: {twice}.")

    # -- shape ---------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(D, N, F)`."""
        d, n, f = self.values.shape
        return d, n, f

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    def __repr__(self) -> str:
        d, n, f = self.shape
        span = f"{self.calendar[0]:%Y-%m-%d}..{self.calendar[-1]:%Y-%m-%d}" if d else "no dates"
        return f"Panel({d} dates {span}, {n} instruments, {f} fields, {self.device})"

    # -- access --------------------------------------------------------------------------------

    def position(self, field: str) -> int:
        """The place of a field; a DataError with the nearest name where it is unknown."""
        try:
            return self._position[field]
        except KeyError:
            raise DataError(unknown_name("field", field, self.fields)) from None

    def column(self, field: str) -> Tensor:
        """One field as `[D, N]`; a view, not to be written."""
        return self.values[:, :, self.position(field)]

    def select(
        self,
        *,
        fields: Sequence[str] | None = None,
        instruments: Sequence[str] | None = None,
        start: Any = None,
        end: Any = None,
    ) -> Panel:
        """A panel of some fields, instruments and dates (both ends inclusive)."""
        rows = self.rows(start, end)
        values, mask = self.values[rows], self.mask[rows]
        spans = clip_spans(self.spans - rows.start, values.shape[0])
        names = self.instruments
        if instruments is not None:
            keep = names.get_indexer(pd.Index(list(instruments), dtype="str"))
            if (keep < 0).any():
                missing = str(list(instruments)[int(np.flatnonzero(keep < 0)[0])])
                raise DataError(unknown_name("instrument", missing, names))
            chosen = torch.as_tensor(keep, device=values.device)
            values = values.permute(2, 0, 1)[:, :, chosen].permute(1, 2, 0)
            mask = mask[:, chosen]
            spans, names = spans[chosen], names[keep]
        if fields is not None:
            places = [self.position(f) for f in fields]
            chosen = torch.tensor(places, dtype=torch.int64, device=values.device)
            values = values.permute(2, 0, 1)[chosen].permute(1, 2, 0)
        wanted = self.fields if fields is None else fields
        return Panel(values, self.calendar[rows], names, wanted, mask=mask, spans=spans)

    def rows(self, start: Any = None, end: Any = None) -> slice:
        """The calendar rows of the inclusive date span `start..end` (None is open)."""
        return date_rows(self.calendar, start, end)

    def gather(self, dates: Tensor, instruments: Tensor, step_len: int = 1) -> Tensor:
        """Windows `[B, T, F]` that end at each (date row, instrument column) pair.

        Rows before the calendar's start are NaN. Index tensors are int64 `[B]` on the values'
        device.
        """
        steps = torch.arange(step_len - 1, -1, -1, device=self.device)
        rows = dates[:, None] - steps
        out = self.values[rows.clamp(min=0), instruments[:, None]]
        return out.masked_fill((rows < 0)[..., None], float("nan"))

    def to(self, device: torch.device | str) -> Panel:
        """The same panel on another device."""
        return Panel(
            self.values.to(device),
            self.calendar,
            self.instruments,
            self.fields,
            mask=self.mask.to(device),
            spans=self.spans.to(device),
        )

    def fingerprint(self) -> str:
        """A hash of the content (values, mask, names, dates), independent of device and strides."""
        digest = hashlib.sha256()
        for part in (self.calendar.asi8, "\n".join(self.instruments), "\n".join(self.fields)):
            digest.update(part.encode() if isinstance(part, str) else part.tobytes())
        for k in range(len(self.fields)):
            digest.update(self.values[:, :, k].contiguous().cpu().numpy().tobytes())
        digest.update(np.packbits(self.mask.cpu().numpy()).tobytes())
        return digest.hexdigest()[:32]

    # -- frames --------------------------------------------------------------------------------

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Panel:
        """A panel of a `(datetime, instrument)` frame of numeric columns.

        A row that is in the frame exists, even if all its values are NaN. The rows of an
        instrument must ascend by date; instrument-major and date-major order are both fine.

        Raises DataError for other index levels, doubled or descending rows, time zones, and
        columns that are not numeric.
        """
        calendar, rows, instruments, columns = _index_of(frame)
        numeric = _numeric(frame)
        _check_rows(rows, columns, calendar, instruments)
        d, n, f = len(calendar), len(instruments), numeric.shape[1]
        values = torch.full((f, d, n), float("nan"))
        mask = torch.zeros((d, n), dtype=torch.bool)
        at = (torch.as_tensor(rows), torch.as_tensor(columns))
        mask[at] = True
        for k in range(f):
            values[k][at] = torch.as_tensor(numeric[:, k].copy())
        spans = torch.tensor([[0, -1]]).repeat(n, 1)
        order = torch.arange(d)[:, None]
        spans[:, 0] = torch.where(mask, order, d).amin(0) if d else 0
        spans[:, 1] = torch.where(mask, order, -1).amax(0) if d else -1
        fields = [c if isinstance(c, str) else "/".join(map(str, c)) for c in frame.columns]
        return cls(values.permute(1, 2, 0), calendar, instruments, fields, mask=mask, spans=spans)

    def to_frame(
        self, fields: Sequence[str] | None = None, *, start: Any = None, end: Any = None
    ) -> pd.DataFrame:
        """The rows of the mask as a `(datetime, instrument)` frame, float32, sorted."""
        rows = self.rows(start, end)
        names = list(self.fields if fields is None else fields)
        at = torch.nonzero(self.mask[rows], as_tuple=True)
        # Levels and codes are known: nothing is sorted or looked up.
        index = pd.MultiIndex(
            levels=[self.calendar[rows], self.instruments],  # type: ignore[list-item]  # indexes will do
            codes=[a.cpu().numpy() for a in at],  # type: ignore[misc]  # as will arrays
            names=list(NAMES),
            verify_integrity=False,
        )
        data = np.empty((len(index), len(names)), dtype=np.float32)
        for k, name in enumerate(names):
            data[:, k] = self.column(name)[rows][at].cpu().numpy()
        return pd.DataFrame(data, index=index, columns=pd.Index(names, dtype="str"))


def within_spans(spans: Tensor, num_dates: int) -> Tensor:
    """`[D, N]` bool: the rows between an instrument's first and last stored day."""
    order = torch.arange(num_dates, device=spans.device)[:, None]
    return (order >= spans[:, 0]) & (order <= spans[:, 1])


def clip_spans(spans: Tensor, num_dates: int) -> Tensor:
    """Spans `[N, 2]` cut to the rows `0..num_dates-1`; `(0, -1)` where nothing is left."""
    first, last = spans[:, 0].clamp(min=0), spans[:, 1].clamp(max=num_dates - 1)
    empty = last < first
    return torch.stack([first.masked_fill(empty, 0), last.masked_fill(empty, -1)], 1)


def _spans_of(values: Tensor) -> Tensor:
    """First and last row `[N, 2]` with any value."""
    d, n = values.shape[:2]
    if d == 0:
        return torch.tensor([[0, -1]], device=values.device).repeat(n, 1)
    seen = torch.zeros((d, n), dtype=torch.bool, device=values.device)
    for k in range(values.shape[2]):
        seen |= ~values[:, :, k].isnan()
    order = torch.arange(d, device=values.device)[:, None]
    first = torch.where(seen, order, d).amin(0)
    last = torch.where(seen, order, -1).amax(0)
    return torch.stack([torch.where(last < 0, torch.zeros_like(first), first), last], 1)


def _index_of(
    frame: pd.DataFrame,
) -> tuple[pd.DatetimeIndex, np.ndarray, list[str], np.ndarray]:
    """`(calendar, row of each frame row, instruments, column of each frame row)`, sorted."""
    if not isinstance(frame.index, pd.MultiIndex) or set(frame.index.names) != set(NAMES):
        raise DataError(
            f"expected a frame indexed by {NAMES}, got levels {list(frame.index.names)}. Mend it "
            "with frame.set_index(['datetime', 'instrument'])."
        )
    index = frame.index.remove_unused_levels()
    coded = {name: (index.levels[k], index.codes[k]) for k, name in enumerate(index.names)}
    dates, row = coded[NAMES[0]]
    names, column = coded[NAMES[1]]
    if (np.asarray(row) < 0).any():
        raise DataError("some rows have no date (NaT); drop or mend them first.")
    if (np.asarray(column) < 0).any():
        raise DataError("some rows have no instrument; drop or mend them first.")
    calendar, row_of = np.unique(normalise_calendar(dates), return_inverse=True)
    texts, column_of = np.unique(
        np.array([str(n) for n in names], dtype=object), return_inverse=True
    )
    return pd.DatetimeIndex(calendar), row_of[row], list(texts), column_of[column]


def _numeric(frame: pd.DataFrame) -> np.ndarray:
    bad = [c for c, t in frame.dtypes.items() if not (pd.api.types.is_numeric_dtype(t))]
    if bad:
        kinds = ", ".join(f"{c!r} ({frame[c].dtype})" for c in bad[:5])
        raise DataError(f"every column must be numeric; not numeric: {kinds}. Drop or encode them.")
    return frame.to_numpy(dtype=np.float32, na_value=np.nan)


def _check_rows(
    rows: np.ndarray, columns: np.ndarray, calendar: pd.DatetimeIndex, instruments: Sequence[str]
) -> None:
    """Refuse doubled rows and rows whose dates descend within an instrument.

    Dates that ascend from row to row hold no date twice, so neighbours are all there is to see.
    """
    if len(rows) == 0:
        return
    order = np.argsort(columns, kind="stable")
    same = columns[order][1:] == columns[order][:-1]
    step = np.diff(rows[order])
    for what, wrong in (("doubled", same & (step == 0)), ("unsorted", same & (step < 0))):
        if wrong.any():
            k = order[1:][np.flatnonzero(wrong)[0]]
            where = f"({calendar[rows[k]]:%Y-%m-%d}, {instruments[columns[k]]})"
            mend = (
                "drop one of each with frame[~frame.index.duplicated()]"
                if what == "doubled"
                else "sort with frame.sort_index()"
            )
            raise DataError(f"{what} row {where}, {int(wrong.sum())} in all; {mend}.")
