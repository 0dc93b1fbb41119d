"""Bars from parquet and CSV files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.data.panel import NAMES, Panel, normalise_calendar
from qtorch.data.source.base import Membership, frequency
from qtorch.data.source.frame import PanelSource, checked_membership, span_membership

logger = logging.getLogger(__name__)

LAYOUTS = ("long", "per_instrument", "wide")
ENDINGS = (".parquet", ".pq", ".csv", ".csv.gz")
DATETIME, INSTRUMENT = NAMES
DATE_NAMES = (DATETIME, "date", "time", "timestamp")
INSTRUMENT_NAMES = (INSTRUMENT, "symbol", "ticker", "code")
EMPTY_CELLS = ["", "nan", "NaN", "null", "#N/A"]


class TableSource(PanelSource):
    """Reads bars of parquet and CSV files into memory.

    `layout`: `long`, one row a bar, in one file or in a folder of parts (a dataset);
    `per_instrument`, a folder with one file an instrument, named after it; `wide`, a folder with
    one file a field, named after it: dates down, instruments across. CSV by ending `.csv` or
    `.csv.gz`, parquet by `.parquet` or `.pq`.

    `columns` maps our names to the file's: `{"datetime": "date", "instrument": "symbol",
    "close": "adj_close"}`. Fields named there are the fields read; with none named, every column
    but date and instrument is one. Without a mapping the dates are sought in `datetime`, `date`,
    `time` or `timestamp`, instruments in `instrument`, `symbol`, `ticker` or `code`, in the
    stored index too. For `wide`, the mapping's fields name files.

    `universes` names a membership file (columns universe, instrument, start, end; the last two
    optional), or gives the universes as FrameSource does. `all` is always there: each instrument
    from its first to its last row.

    Within a file the rows of an instrument ascend by date. Raises DataError for doubled or
    descending rows, dates with a time zone, columns that are not numeric, and names in the
    mapping that the file lacks (with the nearest).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: str = "long",
        columns: Mapping[str, str] | None = None,
        universes: str | Path | Mapping[str, Any] | None = None,
        freq: str = "day",
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(unknown_name("layout", layout, LAYOUTS))
        self.path = str(path)
        self.layout = layout
        self.columns = dict(columns or {})
        self._given = universes
        self.freq = frequency(freq)
        self._place = Path(path).expanduser()
        if not self._place.exists():
            raise DataError(f"no file or folder {self._place}; check the path of TableSource.")
        if layout != "long" and not self._place.is_dir():
            raise DataError(f"layout {layout!r} needs a folder of files, {self._place} is a file.")
        self._panel: Panel | None = None
        self._memberships: dict[str, Membership] | None = None

    def panel(self) -> Panel:
        if self._panel is None:
            read: dict[str, Callable[[], Panel]] = {
                "long": self._read_long,
                "per_instrument": self._read_per_instrument,
                "wide": self._read_wide,
            }
            try:
                self._panel = read[self.layout]()
            except DataError as error:
                # The place is what the user can act on; errors of one file name it already.
                if str(self._place) in str(error):
                    raise
                raise DataError(f"{self._place}: {error}") from error
            logger.info("read %s from %s", self._panel, self._place)
        return self._panel

    def memberships(self) -> Mapping[str, Membership]:
        if self._memberships is None:
            panel = self.panel()
            found = {"all": span_membership(panel)}
            given = self._given
            listed = read_memberships(given) if isinstance(given, str | Path) else (given or {})
            for name, members in listed.items():
                found[name] = checked_membership(name, members, panel)
            self._memberships = found
        return self._memberships

    def __getstate__(self) -> dict[str, Any]:
        """What is read anew from the files is neither copied nor stored."""
        return {**self.__dict__, "_panel": None, "_memberships": None}

    # -- layouts ---------------------------------------------------------------------------------

    def _read_long(self) -> Panel:
        files = files_in(self._place) if self._place.is_dir() else [self._place]
        frames = [self._bars(read_table(file), file, None) for file in files]
        return Panel.from_frame(_together(frames))

    def _read_per_instrument(self) -> Panel:
        files = files_in(self._place)
        frames = [self._bars(read_table(file), file, name_of(file)) for file in files]
        shared = set.intersection(*(set(frame.columns) for frame in frames))
        lacking = [f for f in frames[0].columns if f not in shared]
        if lacking:
            raise DataError(
                f"the files do not hold the same columns: {lacking} are not in all of them. Name "
                "the fields to read with columns={'close': 'close', ...}."
            )
        return Panel.from_frame(_together([frame[list(frames[0].columns)] for frame in frames]))

    def _read_wide(self) -> Panel:
        files = {name_of(file): file for file in files_in(self._place)}
        fields = {ours: theirs for ours, theirs in self.columns.items() if ours not in NAMES}
        for theirs in fields.values():
            if theirs not in files:
                raise DataError(unknown_name("file of a field", theirs, files))
        columns = [
            self._wide_field(files[name]).rename(field.lstrip("$"))
            for field, name in (fields or {name: name for name in files}).items()
        ]
        return Panel.from_frame(pd.concat(columns, axis=1).sort_index())

    def _wide_field(self, file: Path) -> pd.Series:
        """One field's table as a `(datetime, instrument)` column of the cells that hold a value."""
        table = read_table(file)
        column, dates = self._dates(table, file)
        wide = table.drop(columns=column)
        _check_numeric(wide, file)
        if not (dates.is_monotonic_increasing and dates.is_unique):
            raise DataError(f"{file}: the dates must ascend and stand once each.")
        names = pd.Index([str(c) for c in wide.columns])
        if not names.is_unique:
            twice = names[names.duplicated()].unique().tolist()[:5]
            raise DataError(f"{file}: some instruments stand in two columns: {twice}.")
        values = wide.to_numpy(dtype=np.float32, na_value=np.nan).reshape(-1)
        held = np.flatnonzero(~np.isnan(values))
        index = pd.MultiIndex.from_product([dates, names], names=[DATETIME, INSTRUMENT])
        return pd.Series(values[held], index=index[held])

    # -- one file --------------------------------------------------------------------------------

    def _bars(self, table: pd.DataFrame, file: Path, instrument: str | None) -> pd.DataFrame:
        """A file's rows as a `(datetime, instrument)` frame of our field names."""
        taken, dates = self._dates(table, file)
        marks = [taken]
        if instrument is None:
            column = self._column(INSTRUMENT, INSTRUMENT_NAMES, table, file)
            if table[column].isna().any():
                raise DataError(f"{file}: some rows have no instrument in {column!r}.")
            names = pd.Index(table[column].astype(str))
            marks.append(column)
        else:
            names = pd.Index([instrument] * len(table))
        fields = {ours: theirs for ours, theirs in self.columns.items() if ours not in NAMES}
        if not fields:
            fields = {c.lstrip("$"): c for c in table.columns if c not in marks}
        for theirs in fields.values():
            _known(theirs, table, file)
        bars = table[list(fields.values())]
        _check_numeric(bars, file)
        bars = bars.set_axis([f.lstrip("$") for f in fields], axis=1)
        bars.index = pd.MultiIndex.from_arrays([dates, names], names=[DATETIME, INSTRUMENT])
        return bars

    def _dates(self, table: pd.DataFrame, file: Path) -> tuple[str, pd.DatetimeIndex]:
        """The column of dates and what stands in it."""
        sought = (*DATE_NAMES, table.columns[0]) if self.layout == "wide" else DATE_NAMES
        column = self._column(DATETIME, sought, table, file)
        values = table[column]
        if pd.api.types.is_numeric_dtype(values):
            # 20200131 is a date that many files write as a number; a count of seconds is not.
            if not values.between(10_000_000, 99_999_999).all():
                raise DataError(f"{file}: the column {column!r} holds numbers, not dates.")
            values = values.astype("int64").astype(str)
        try:
            dates = normalise_calendar(values)
        except DataError as error:
            raise DataError(f"{file}, column {column!r}: {error}") from error
        if dates.hasnans:
            raise DataError(f"{file}: some rows have no date in {column!r}.")
        return column, dates

    def _column(self, ours: str, sought: Sequence[str], table: pd.DataFrame, file: Path) -> str:
        """The file's column for the date or the instrument: as mapped, else by its usual names."""
        mapped = self.columns.get(ours)
        if mapped is not None:
            _known(mapped, table, file)
            return mapped
        for name in sought:
            if name in table.columns:
                return name
        raise DataError(
            f"{file}: no column for the {ours}; name it with columns={{{ours!r}: ...}}. "
            f"Columns: {', '.join(table.columns[:12])}."
        )


def files_in(folder: Path) -> list[Path]:
    """The tables in a folder and below it, by name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(ENDINGS))
    if not files:
        raise DataError(f"{folder} holds no table; expected files ending {', '.join(ENDINGS)}.")
    return files


def name_of(file: Path) -> str:
    """A file's name without its ending (`BRK.B.csv` is `BRK.B`)."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if file.name.endswith(ending):
            return file.name[: -len(ending)]
    return file.name


def read_table(file: Path) -> pd.DataFrame:
    """A parquet or CSV file as a frame; a stored index becomes columns, names become text."""
    if not file.name.endswith(ENDINGS):
        raise DataError(f"{file} is no table; expected a file ending {', '.join(ENDINGS)}.")
    try:
        if file.name.endswith((".parquet", ".pq")):
            table = pd.read_parquet(file)
        else:
            # An instrument may be called NA: only an empty cell is missing there.
            table = pd.read_csv(file, keep_default_na=False, na_values=EMPTY_CELLS)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error
    if isinstance(table.index, pd.DatetimeIndex) and table.index.name is None:
        table.index.name = DATETIME
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    table.columns = pd.Index([str(c) for c in table.columns])
    return table


def read_memberships(path: str | Path) -> dict[str, dict[str, list[tuple[Any, Any]]]]:
    """Universes of a file with columns universe, instrument and, where they end, start, end."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"no membership file {file}.")
    table = read_table(file)
    for column in ("universe", "instrument"):
        _known(column, table, file)
    ends = {}
    for column, open_end in (("start", pd.Timestamp.min), ("end", pd.Timestamp.max)):
        given = table[column] if column in table else pd.Series(pd.NaT, index=table.index)
        ends[column] = pd.Series(normalise_calendar(given)).fillna(open_end)
    found: dict[str, dict[str, list[tuple[Any, Any]]]] = {}
    names = table["universe"].astype(str), table["instrument"].astype(str)
    for universe, instrument, start, end in zip(*names, ends["start"], ends["end"], strict=True):
        found.setdefault(universe, {}).setdefault(instrument, []).append((start, end))
    return found


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Parts as one frame; those of a folder need not be named in the order of their dates."""
    held = [frame for frame in frames if len(frame)] or frames[:1]
    starts = [frame.index[0][0] if len(frame) else 0 for frame in held]
    order = sorted(range(len(held)), key=lambda k: starts[k])
    return held[0] if len(held) == 1 else pd.concat([held[k] for k in order])


def _known(column: str, table: pd.DataFrame, file: Path) -> None:
    if column not in table.columns:
        raise DataError(f"{file}: {unknown_name('column', column, table.columns)}")


def _check_numeric(table: pd.DataFrame, file: Path) -> None:
    bad = [f"{c!r} ({t})" for c, t in table.dtypes.items() if not pd.api.types.is_numeric_dtype(t)]
    if bad:
        raise DataError(
            f"{file}: columns that are not numeric: {', '.join(bad[:5])}. Leave them out by naming "
            "the fields to read: columns={'close': 'close', ...}."
        )
