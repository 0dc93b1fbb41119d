"""Bars from parquet and CSV files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.content_digest import digest_text
from qtorch.core.dates import as_stamp, convert_dates, frequency, last_date
from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.core.identity import digest
from qtorch.core.tables import read_csv
from qtorch.data.panel.panel import (
    NAMES,
    Panel,
    duplicate_names,
    non_numeric_columns,
    normalise_calendar,
)
from qtorch.data.source.base import Membership
from qtorch.data.source.frame import PanelSource, Universes, build_memberships, span_membership

logger = logging.getLogger(__name__)

LAYOUTS = ("long", "per_instrument", "wide")
SUFFIXES = (".parquet", ".pq", ".csv", ".csv.gz")
DATETIME, INSTRUMENT = NAMES
DATE_COLUMNS = (DATETIME, "date", "time", "timestamp")
INSTRUMENT_COLUMNS = (INSTRUMENT, "symbol", "ticker", "code")


class TableSource(PanelSource):
    """Reads bars from parquet and CSV files into memory.

    `layout` is one of: `long`, one row per bar, in one file or in a folder of parts (a dataset);
    `per_instrument`, a folder with one file per instrument, named after it; `wide`, a folder with
    one file per field, named after it, with a row per date and a column per instrument. CSV files
    end in `.csv` or `.csv.gz`, parquet files in `.parquet` or `.pq`; folders include subfolders.

    `columns` maps qtorch's names to the names in the file: `{"datetime": "date", "instrument":
    "symbol", "close": "adj_close"}`. If it names fields, only those are read; otherwise all
    columns except date and instrument are fields. Without a mapping, dates are read from
    `datetime`, `date`, `time` or `timestamp`, and instruments from `instrument`, `symbol`,
    `ticker` or `code`, including the levels of a stored index. For `wide`, the mapping's fields
    are the names of files.

    `universes` is the path of a membership file (columns universe, instrument, start, end; the
    last two optional) or a mapping as in FrameSource. The universe `all` always exists and has
    each instrument from its first to its last row.

    Within a file the rows of an instrument must ascend by date. Raises DataError for duplicate
    or descending rows, dates with a time zone, columns that are not numeric, and names in the
    mapping that the file does not have (with the nearest name).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: str = "long",
        columns: Mapping[str, str] | None = None,
        universes: str | Path | Universes | None = None,
        freq: str | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(unknown_name_message("layout", layout, LAYOUTS))
        self.path = str(path)
        self.layout = layout
        self.columns = dict(columns or {})
        self._universes = universes
        self.freq = None if freq is None else frequency(freq)
        self._root = Path(path).expanduser()
        if not self._root.exists():
            raise DataError(f"no file or folder {self._root}; check the path of TableSource.")
        if layout != "long" and not self._root.is_dir():
            raise DataError(
                f"layout {layout!r} needs a folder of files, but {self._root} is a file."
            )
        self._panel: Panel | None = None
        self._memberships: dict[str, Membership] | None = None
        self._panel_fingerprint: str | None = None

    def panel(self) -> Panel:
        if self._panel is None:
            readers: dict[str, Callable[[], Panel]] = {
                "long": self._read_long,
                "per_instrument": self._read_per_instrument,
                "wide": self._read_wide,
            }
            self._panel_fingerprint = self._compute_fingerprint()
            try:
                self._panel = readers[self.layout]()
            except DataError as error:
                # Add the path for the user; an error about a single file names it already.
                if str(self._root) in str(error):
                    raise
                raise DataError(f"{self._root}: {error}") from error
            logger.info("read %s from %s", self._panel, self._root)
        return self._panel

    def memberships(self) -> Mapping[str, Membership]:
        if self._memberships is None:
            panel, universes = self.panel(), self._universes
            if isinstance(universes, str | Path):
                universes = read_memberships(universes)
            self._memberships = {
                "all": span_membership(panel),
                **build_memberships(universes, panel),
            }
        return self._memberships

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the data, which can be read again from the files."""
        empty = dict.fromkeys(("_panel", "_memberships", "_panel_fingerprint"))
        return {**self.__dict__, **empty}

    def fingerprint(self) -> str:
        """Hash the bytes of the files and the options, without parsing the files.

        Raises DataError if a file has changed since this source has read it.
        """
        fingerprint = self._compute_fingerprint()
        if self._panel_fingerprint not in (None, fingerprint):
            raise DataError(
                f"{self._root} has changed since it was read (fingerprint "
                f"{self._panel_fingerprint} then, {fingerprint} now). Start again with the new "
                "data, and do not write to the files while they are in use."
            )
        return fingerprint

    def _compute_fingerprint(self) -> str:
        files = list_tables(self._root) if self._root.is_dir() else [self._root]
        universes: Any = self._universes
        if isinstance(universes, str | Path):
            universes = digest_text(universes)
        elif universes is not None:
            universes = {name: _plain_members(each) for name, each in universes.items()}
        names = [f.relative_to(self._root).as_posix() for f in files]
        contents = [digest_text(file) for file in files]
        return digest([self.layout, self.columns, self.freq or "day", universes, names, contents])

    # -- layouts ---------------------------------------------------------------------------------

    def _read_long(self) -> Panel:
        files = list_tables(self._root) if self._root.is_dir() else [self._root]
        column = self.columns.get(INSTRUMENT, INSTRUMENT_COLUMNS)
        frames = [self._parse_bars(read_table(file, [column]), file, None) for file in files]
        return Panel.from_frame(_concat_frames(frames))

    def _read_per_instrument(self) -> Panel:
        files = list_tables(self._root)
        frames = [self._parse_bars(read_table(file), file, file_stem(file)) for file in files]
        common_fields = set.intersection(*(set(frame.columns) for frame in frames))
        missing_fields = [f for f in frames[0].columns if f not in common_fields]
        if missing_fields:
            raise DataError(
                f"the files do not have the same columns: {missing_fields} are not in all of them. "
                "Name the fields to read with columns={'close': 'close', ...}."
            )
        fields = list(frames[0].columns)
        return Panel.from_frame(_concat_frames([frame[fields] for frame in frames]))

    def _read_wide(self) -> Panel:
        files: dict[str, list[Path]] = {}
        for file in list_tables(self._root):
            files.setdefault(file_stem(file), []).append(file)
        fields = self._field_columns() or {name: name for name in files}
        for name in fields.values():
            if name not in files:
                raise DataError(unknown_name_message("file of a field", name, files))
            if len(files[name]) > 1:
                first, second = files[name][:2]
                raise DataError(
                    f"{first} and {second} have the same name; layout 'wide' reads one file per "
                    "field. Join them into one table."
                )
        columns = [
            self._read_wide_field(files[name][0]).rename(field.lstrip("$"))
            for field, name in fields.items()
        ]
        return Panel.from_frame(pd.concat(columns, axis=1).sort_index())

    def _read_wide_field(self, file: Path) -> pd.Series:
        """Read a field's table as a `(datetime, instrument)` Series without its NaN cells."""
        table = read_table(file)
        date_column, dates = self._parse_dates(table, file)
        wide = table.drop(columns=date_column)
        _require_numeric(wide, file)
        if not (dates.is_monotonic_increasing and dates.is_unique):
            raise DataError(f"{file}: the dates must be ascending and unique.")
        names = pd.Index([str(c) for c in wide.columns])
        if duplicates := duplicate_names(names):
            raise DataError(f"{file}: some instruments have more than one column: {duplicates}.")
        values = wide.to_numpy(dtype=np.float32, na_value=np.nan).reshape(-1)
        present_cells = np.flatnonzero(~np.isnan(values))
        index = pd.MultiIndex.from_product([dates, names], names=[DATETIME, INSTRUMENT])
        return pd.Series(values[present_cells], index=index[present_cells])

    def _field_columns(self) -> dict[str, str]:
        """Return the part of `columns` that names fields, empty if all fields are read."""
        return {field: name for field, name in self.columns.items() if field not in NAMES}

    # -- one file --------------------------------------------------------------------------------

    def _parse_bars(self, table: pd.DataFrame, file: Path, instrument: str | None) -> pd.DataFrame:
        """Convert a file's rows to a `(datetime, instrument)` frame with qtorch's field names.

        `instrument`: that of all rows; None if the file has a column for it.
        """
        date_column, dates = self._parse_dates(table, file)
        index_columns = [date_column]
        if instrument is None:
            column = self._find_column(INSTRUMENT, INSTRUMENT_COLUMNS, table, file)
            if table[column].isna().any():
                raise DataError(f"{file}: some rows have no instrument in {column!r}.")
            instruments = pd.Index(table[column].astype(str))
            index_columns.append(column)
        else:
            instruments = pd.Index([instrument] * len(table))
        fields = self._field_columns()
        if not fields:
            fields = {c.lstrip("$"): c for c in table.columns if c not in index_columns}
        for file_column in fields.values():
            _require_column(file_column, table, file)
        bars = table[list(fields.values())]
        _require_numeric(bars, file)
        bars = bars.set_axis([f.lstrip("$") for f in fields], axis=1)
        bars.index = pd.MultiIndex.from_arrays([dates, instruments], names=[DATETIME, INSTRUMENT])
        return bars

    def _parse_dates(self, table: pd.DataFrame, file: Path) -> tuple[str, pd.DatetimeIndex]:
        """Return the name of the date column and its parsed dates."""
        candidates = (*DATE_COLUMNS, table.columns[0]) if self.layout == "wide" else DATE_COLUMNS
        column = self._find_column(DATETIME, candidates, table, file)
        values = table[column]
        if pd.api.types.is_numeric_dtype(values):
            # Many files write dates as numbers such as 20200131; reject counts of seconds.
            numbers = values.dropna()
            if not numbers.between(10_000_000, 99_999_999).all():
                raise DataError(f"{file}: the column {column!r} contains numbers, not dates.")
            values = numbers.astype("int64").astype(str).reindex(values.index)
        try:
            dates = normalise_calendar(values)
        except DataError as error:
            raise DataError(f"{file}, column {column!r}: {error}") from error
        if dates.hasnans:
            raise DataError(f"{file}: some rows have no date in {column!r}.")
        return column, dates

    def _find_column(
        self, level: str, candidates: Sequence[str], table: pd.DataFrame, file: Path
    ) -> str:
        """Find the column of "datetime" or "instrument" by the mapping or else by common names."""
        column = self.columns.get(level)
        if column is not None:
            _require_column(column, table, file)
            return column
        for name in candidates:
            if name in table.columns:
                return name
        raise DataError(
            f"{file}: no column for the {level}; set it with columns={{{level!r}: ...}}. "
            f"Columns: {', '.join(table.columns[:12])}."
        )


def _plain_members(members: Sequence[str] | Mapping[str, Any]) -> list[Any]:
    if not isinstance(members, Mapping):
        return [str(name) for name in members]
    return [[str(n), [[str(a), str(b)] for a, b in spans]] for n, spans in members.items()]


def list_tables(folder: Path) -> list[Path]:
    """Return the tables in a folder and its subfolders, sorted by path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{folder} has no table; expected files that end in {', '.join(SUFFIXES)}.")
    return files


def file_stem(file: Path) -> str:
    """Return a file's name without its suffix (`BRK.B` for `BRK.B.csv`)."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.name.endswith(suffix):
            return file.name[: -len(suffix)]
    return file.name


def read_table(file: Path, name_columns: Iterable[str | tuple[str, ...]] = ()) -> pd.DataFrame:
    """Read a parquet or CSV file; a stored index becomes columns, and column names are strings.

    `name_columns`: the columns of a CSV file that stay text as written (instruments such as 000001
    or NA). A tuple lists alternatives, of which the first that the file has is meant.
    """
    if not file.name.endswith(SUFFIXES):
        raise DataError(
            f"{file} is not a table; expected a file that ends in {', '.join(SUFFIXES)}."
        )
    try:
        if file.name.endswith((".parquet", ".pq")):
            table = pd.read_parquet(file)
        else:
            table = read_csv(file, name_columns)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error
    if isinstance(table.index, pd.DatetimeIndex) and table.index.name is None:
        table.index.name = DATETIME
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    table.columns = pd.Index([str(c) for c in table.columns])
    return table


def read_memberships(path: str | Path) -> dict[str, dict[str, list[tuple[Any, Any]]]]:
    """Read universes from a file with columns universe, instrument and optionally start, end."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no membership file {file}.")
    # Read dates as text too, because 2020 and 20200131 would become numbers.
    table = read_table(file, ("universe", "instrument", "start", "end"))
    for column in ("universe", "instrument"):
        _require_column(column, table, file)
    bounds = {}
    for column, convert, default in (
        ("start", as_stamp, pd.Timestamp.min),
        ("end", last_date, pd.Timestamp.max),
    ):
        values = table[column] if column in table else pd.Series(pd.NaT, index=table.index)
        bounds[column] = convert_dates(values, convert).fillna(default)
    memberships: dict[str, dict[str, list[tuple[Any, Any]]]] = {}
    names = table["universe"].astype(str), table["instrument"].astype(str)
    for universe, instrument, start, end in zip(
        *names, bounds["start"], bounds["end"], strict=True
    ):
        memberships.setdefault(universe, {}).setdefault(instrument, []).append((start, end))
    return memberships


def _concat_frames(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate the frames of the files in the order of their first dates.

    The rows of an instrument must ascend, and the file names need not follow the dates.
    """
    non_empty = sorted((f for f in frames if len(f)), key=lambda frame: frame.index[0][0])
    return pd.concat(non_empty) if len(non_empty) > 1 else (non_empty or frames)[0]


def _require_column(column: str, table: pd.DataFrame, file: Path) -> None:
    if column not in table.columns:
        raise DataError(f"{file}: {unknown_name_message('column', column, table.columns)}")


def _require_numeric(table: pd.DataFrame, file: Path) -> None:
    if problems := non_numeric_columns(table):
        raise DataError(
            f"{file}: columns that are not numeric: {problems}. Name the fields "
            "to read to leave them out: columns={'close': 'close', ...}."
        )
