"""The panel: bars or features of all instruments on all days in one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.dates import date_rows, parse_dates
from qtorch.core.errors import DataError, DuplicateRowError, format_count, unknown_name_message
from qtorch.core.tables import convert_decimals, text_names

NAMES = ("datetime", "instrument")


def normalise_calendar(dates: Any) -> pd.DatetimeIndex:
    """Convert dates to a naive `datetime64[ns]` index named "datetime".

    Raises DataError as `qtorch.core.dates.parse_dates` does, e.g. for dates with a time zone (their
    day is ambiguous).
    """
    return parse_dates(dates).rename(NAMES[0])


def coverage_dates(calendar: pd.DatetimeIndex, empty: str = "no dates") -> str:
    """Return the first and last date of a calendar for messages, or `empty`."""
    return f"{calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d}" if len(calendar) else empty


def duplicate_names(names: Any) -> list[Any]:
    """Return up to five names that occur more than once, for messages."""
    index = pd.Index(names)
    return list(index[index.duplicated()].unique()[:5])


def multi_index(
    calendar: pd.DatetimeIndex, instruments: pd.Index, date: Tensor, instrument: Tensor
) -> pd.MultiIndex:
    """Build the `(datetime, instrument)` index of calendar rows and instrument columns.

    It is built from levels and codes, so that pandas does not sort or look up anything.
    """
    levels: list[Any] = [calendar, instruments]
    codes: list[Any] = [date.cpu().numpy(), instrument.cpu().numpy()]
    index = pd.MultiIndex(levels=levels, codes=codes, names=list(NAMES), verify_integrity=False)
    return index.remove_unused_levels()


class Panel:
    """`[D, N, F]` float32 values with a calendar, instruments and field names.

    NaN means "no bar". `mask [D, N]` marks the rows that belong to the universe that day, i.e. that
    exist for samples and cross-sections. `spans [N, 2]` holds each instrument's first and last
    stored calendar row, both inclusive (`(0, -1)` if it has none). Between them a NaN is a
    suspended day, outside them there is no data; rolling windows treat the two differently.

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
        self.spans = spans if spans is not None else _compute_spans(values)
        self.mask = mask if mask is not None else within_spans(self.spans, len(self.calendar))

    def _check_shapes(self) -> None:
        expected_shape = (len(self.calendar), len(self.instruments), len(self.fields))
        if tuple(self.values.shape) != expected_shape:
            raise DataError(
                f"panel values have shape {tuple(self.values.shape)}, but calendar, instruments "
                f"and fields require {expected_shape} (dates, instruments, fields)."
            )
        if not (self.calendar.is_monotonic_increasing and self.calendar.is_unique):
            raise DataError("the calendar must be unique and in ascending order.")
        for kind, names in (("instrument", self.instruments), ("field", self.fields)):
            if duplicates := duplicate_names(names):
                raise DataError(f"{kind} names must be unique, got duplicates: {duplicates}.")

    # -- shape ---------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(D, N, F)`."""
        d, n, f = self.values.shape
        return d, n, f

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self.values.device

    def __repr__(self) -> str:
        d, n, f = self.shape
        dates = coverage_dates(self.calendar)
        return f"Panel({d} dates {dates}, {n} instruments, {f} fields, {self.device})"

    # -- access --------------------------------------------------------------------------------

    def position(self, field: str) -> int:
        """Return the position of a field; raise DataError with the nearest name if unknown."""
        try:
            return self._position[field]
        except KeyError:
            raise DataError(unknown_name_message("field", field, self.fields)) from None

    def column(self, field: str) -> Tensor:
        """Return one field as `[D, N]`; this is a view and must not be written to."""
        return self.values[:, :, self.position(field)]

    def select(
        self,
        *,
        fields: Sequence[str] | None = None,
        instruments: Sequence[str] | None = None,
        start: Any = None,
        end: Any = None,
    ) -> Panel:
        """Return a panel of some fields, instruments and dates (both ends inclusive)."""
        panel = select_rows(self, self.rows(start, end))
        values, mask, spans, names = panel.values, panel.mask, panel.spans, panel.instruments
        if instruments is not None:
            columns = names.get_indexer(pd.Index(list(instruments), dtype="str"))
            if (columns < 0).any():
                missing = str(list(instruments)[int(np.flatnonzero(columns < 0)[0])])
                raise DataError(unknown_name_message("instrument", missing, names))
            index = torch.as_tensor(columns, device=values.device)
            values = values.permute(2, 0, 1)[:, :, index].permute(1, 2, 0)
            mask = mask[:, index]
            spans, names = spans[index], names[columns]
        if fields is not None:
            field_places = [self.position(f) for f in fields]
            index = torch.tensor(field_places, dtype=torch.int64, device=values.device)
            values = values.permute(2, 0, 1)[index].permute(1, 2, 0)
        field_names = self.fields if fields is None else fields
        return Panel(values, panel.calendar, names, field_names, mask=mask, spans=spans)

    def replace(
        self,
        *,
        values: Tensor | None = None,
        fields: Sequence[str] | None = None,
        mask: Tensor | None = None,
    ) -> Panel:
        """Return a panel of the same dates, instruments and spans with some parts replaced."""
        return Panel(
            self.values if values is None else values,
            self.calendar,
            self.instruments,
            self.fields if fields is None else fields,
            mask=self.mask if mask is None else mask,
            spans=self.spans,
        )

    def rows(self, start: Any = None, end: Any = None) -> slice:
        """Return the calendar rows of the inclusive date span `start..end` (None is open)."""
        return date_rows(self.calendar, start, end)

    def to(self, device: torch.device | str) -> Panel:
        """Return the panel on another device."""
        return Panel(
            self.values.to(device),
            self.calendar,
            self.instruments,
            self.fields,
            mask=self.mask.to(device),
            spans=self.spans.to(device),
        )

    def fingerprint(self) -> str:
        """Return a hash of values, mask, names and dates, independent of device and strides."""
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
        """Build a panel from a `(datetime, instrument)` frame of numeric columns.

        A row of the frame exists, even if all its values are NaN. The rows may be in any order.

        Raises DataError for other index levels, duplicate rows, time zones, and columns that are
        not numeric.
        """
        calendar, rows, instruments, columns = _parse_index(frame)
        numeric = _numeric_values(frame)
        d, n, f = len(calendar), len(instruments), numeric.shape[1]
        values = torch.full((f, d, n), float("nan"))
        mask = torch.zeros((d, n), dtype=torch.bool)
        cells = (torch.as_tensor(rows), torch.as_tensor(columns))
        mask[cells] = True
        if int(mask.sum()) < len(frame):
            index = multi_index(pd.DatetimeIndex(calendar), pd.Index(instruments), *cells)
            raise_duplicate(index, "keep one of each with frame[~frame.index.duplicated()]")
        for k in range(f):
            values[k][cells] = torch.as_tensor(numeric[:, k].copy())
        fields = [c if isinstance(c, str) else "/".join(map(str, c)) for c in frame.columns]
        spans = _row_spans(mask)
        return cls(values.permute(1, 2, 0), calendar, instruments, fields, mask=mask, spans=spans)

    def to_frame(
        self, fields: Sequence[str] | None = None, *, start: Any = None, end: Any = None
    ) -> pd.DataFrame:
        """Return the rows of the mask as a `(datetime, instrument)` frame, float32, sorted."""
        rows = self.rows(start, end)
        names = list(self.fields if fields is None else fields)
        cells = torch.nonzero(self.mask[rows], as_tuple=True)
        index = multi_index(self.calendar[rows], self.instruments, cells[0], cells[1])
        data = np.empty((len(index), len(names)), dtype=np.float32)
        for k, name in enumerate(names):
            data[:, k] = self.column(name)[rows][cells].cpu().numpy()
        return pd.DataFrame(data, index=index, columns=pd.Index(names, dtype="str"))


def select_rows(panel: Panel, rows: slice) -> Panel:
    """Return a panel of some of the calendar rows, which shares the storage."""
    return Panel(
        panel.values[rows],
        panel.calendar[rows],
        panel.instruments,
        panel.fields,
        mask=panel.mask[rows],
        spans=clip_spans(panel.spans - (rows.start or 0), panel.values[rows].shape[0]),
    )


def within_spans(spans: Tensor, num_dates: int) -> Tensor:
    """Return `[D, N]` bool: the rows from an instrument's first to its last stored day."""
    order = torch.arange(num_dates, device=spans.device)[:, None]
    return (order >= spans[:, 0]) & (order <= spans[:, 1])


def clip_spans(spans: Tensor, num_dates: int) -> Tensor:
    """Clip spans `[N, 2]` to the rows `0..num_dates-1`; `(0, -1)` if nothing is left."""
    first, last = spans[:, 0].clamp(min=0), spans[:, 1].clamp(max=num_dates - 1)
    empty = last < first
    return torch.stack([first.masked_fill(empty, 0), last.masked_fill(empty, -1)], 1)


def _compute_spans(values: Tensor) -> Tensor:
    """Return the first and last row with any value, `[N, 2]`."""
    has_value = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    for k in range(values.shape[2]):
        has_value |= ~values[:, :, k].isnan()
    return _row_spans(has_value)


def _row_spans(exists: Tensor) -> Tensor:
    """Return the first and last row `[N, 2]` of each column of `exists [D, N]`; (0, -1) if none."""
    d, n = exists.shape
    if d == 0:
        return torch.tensor([[0, -1]], device=exists.device).repeat(n, 1)
    order = torch.arange(d, device=exists.device)[:, None]
    first = torch.where(exists, order, d).amin(0)
    last = torch.where(exists, order, -1).amax(0)
    return torch.stack([first.masked_fill(last < 0, 0), last], 1)


def _parse_index(
    frame: pd.DataFrame,
) -> tuple[pd.DatetimeIndex, np.ndarray, list[str], np.ndarray]:
    """Return `(calendar, row of each frame row, instruments, column of each frame row)`, sorted."""
    if not isinstance(frame.index, pd.MultiIndex) or set(frame.index.names) != set(NAMES):
        raise DataError(
            f"expected a frame indexed by {NAMES}, got levels {list(frame.index.names)}. Set the "
            "index with frame.set_index(['datetime', 'instrument'])."
        )
    index = frame.index.remove_unused_levels()
    level_codes = {name: (index.levels[k], index.codes[k]) for k, name in enumerate(index.names)}
    dates, row = level_codes[NAMES[0]]
    names, column = level_codes[NAMES[1]]
    calendar_dates = normalise_calendar(dates)
    if (np.asarray(row) < 0).any() or calendar_dates.hasnans:
        raise DataError("some rows have no date (NaT); drop or fix them first.")
    if (np.asarray(column) < 0).any():
        raise DataError("some rows have no instrument; drop or fix them first.")
    calendar, level_rows = np.unique(calendar_dates, return_inverse=True)
    texts, level_columns = np.unique(np.array(text_names(names), dtype=object), return_inverse=True)
    return pd.DatetimeIndex(calendar), level_rows[row], list(texts), level_columns[column]


def require_numeric(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose columns of decimals are floats; raise DataError if others are text.

    The message has up to five columns, with the first wrong cell of each, its date and instrument.
    """
    frame = convert_decimals(frame)
    problems = [
        _describe_column(frame, k)
        for k, kind in enumerate(frame.dtypes)
        if not pd.api.types.is_numeric_dtype(kind)
    ]
    if problems:
        raise DataError(
            f"every column must be numeric; not numeric: {', '.join(problems[:5])}. Correct or "
            "empty these cells, or leave out the columns."
        )
    return frame


def _describe_column(frame: pd.DataFrame, position: int) -> str:
    """Describe a column that is not numeric, with its first cell that is no number."""
    cells = frame.iloc[:, position]
    name = repr(frame.columns[position])
    is_wrong = (pd.to_numeric(cells, errors="coerce").isna() & cells.notna()).to_numpy()
    if not is_wrong.any():
        return f"{name} (numbers of type {cells.dtype}; convert them with astype(float))"
    row = int(np.flatnonzero(is_wrong)[0])
    label = cells.index[row]
    keys = label if isinstance(label, tuple) else (label,)
    place = ", ".join(str(key).removesuffix(" 00:00:00") for key in keys)
    number = format_count(int(is_wrong.sum()), "such cell")
    return f"{name} ({str(cells.iloc[row])!r:.40} at {place}; {number})"


def _numeric_values(frame: pd.DataFrame) -> np.ndarray:
    return require_numeric(frame).to_numpy(dtype=np.float32, na_value=np.nan)


def raise_duplicate(index: pd.Index, advice: str) -> NoReturn:
    """Raise DuplicateRowError for the first row of an index of dates and instruments that repeats.

    `advice` says how to mend it.
    """
    is_duplicate = index.duplicated()
    row: Any = index[int(np.flatnonzero(is_duplicate)[0])]
    date, instrument = (row[index.names.index(name)] for name in NAMES)
    raise DuplicateRowError(date, instrument, int(is_duplicate.sum()), advice)
