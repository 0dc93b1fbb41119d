"""Bars from parquet and CSV files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.content_digest import digest_text
from qtorch.core.dates import date_texts, frequency
from qtorch.core.errors import ConfigError, DataError, DuplicateRowError, unknown_name_message
from qtorch.core.identity import digest
from qtorch.core.session import resolve_path
from qtorch.core.tables import (
    convert_decimals,
    file_stem,
    find_column,
    list_tables,
    partition_values,
    read_table,
    text_names,
)
from qtorch.data.panel.column_names import (
    DATE_COLUMNS,
    EVENT_FIELDS,
    INSTRUMENT_COLUMNS,
    UNIVERSE_COLUMNS,
    describe_names,
    name_fields,
    require_column,
    usual_field,
)
from qtorch.data.panel.frames import ReadOptions
from qtorch.data.panel.panel import NAMES, Panel, duplicate_names, require_numeric
from qtorch.data.panel.spans import read_spans
from qtorch.data.source.adjusted import adjust_prices, select_adjusted_close, warn_raw_prices
from qtorch.data.source.base import Membership
from qtorch.data.source.frame import (
    Memberships,
    PanelSource,
    Universes,
    span_membership,
)

logger = logging.getLogger(__name__)

AUTO, LONG, PER_INSTRUMENT, WIDE = LAYOUTS = ("auto", "long", "per_instrument", "wide")
DATETIME, INSTRUMENT = NAMES

# The panel that was read last in this process, by its folder and fingerprint. The segments of a
# task, its dataset and the windows of a rolling study each have a source of the same files.
_last_panel: dict[tuple[str, str], Panel] = {}


class TableSource(PanelSource):
    """Reads bars from parquet and CSV files into memory.

    `layout` is one of: `long`, one row per bar, in one file or in a folder of parts (a dataset,
    also partitioned in Hive's way: `symbol=AAA/part.parquet`); `per_instrument`, a folder with one
    file per instrument, named after it; `wide`, a folder with one file per field, named after it,
    with a row per date and a column per instrument. `auto` takes a folder as `wide` if all files
    have the names of usual fields, as `long` if the tables have a column for the instrument, else
    as `per_instrument`. CSV files end in `.csv`, `.tsv`, `.csv.gz` or `.tsv.gz`, parquet files in
    `.parquet` or `.pq`; folders include subfolders, but not hidden files.

    `columns` maps qtorch's names to the names in the file: `{"datetime": "date", "instrument":
    "symbol", "close": "adj_close"}`. If it names fields, only those are read; otherwise all
    columns except date and instrument are fields. Without a mapping, dates, instruments and fields
    are known by their usual spellings, such as `Date`, `ticker`, `Open` and `Adj Close`, including
    the levels of a stored index. For `wide`, the mapping's fields are the names of files.

    `adjust` names the column of the adjusted closes. Open, high, low, close and vwap are then
    scaled by adjusted close / close, the volume by its inverse, and the scale is the field
    `factor`, as in Qlib.

    Dates are parsed by one format a column (see `qtorch.core.dates.parse_dates`), which
    `date_format` sets; `timezone` converts dates with a time zone. `decimal`: the decimal point of
    CSV files. Names of instruments are text as written; whole columns of decimals are floats.

    `universes` is the path of a membership file (columns universe, instrument, start, end; the
    last two optional, a blank one is open) or a mapping as in FrameSource. The universe `all`
    always exists and has each instrument from its first to its last row. Members of a file that
    have no bars are left out with a warning; a universe is only built when it is asked for.

    The rows may be in any order, such as the newest first. Raises DataError for duplicate rows,
    dates with a time zone, columns that are not numeric, columns of the same name, and
    names in the mapping that the file does not have (with the nearest name).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: str = AUTO,
        columns: Mapping[str, str] | None = None,
        universes: str | Path | Universes | None = None,
        freq: str | None = None,
        adjust: str | None = None,
        date_format: str | None = None,
        timezone: str | None = None,
        decimal: str = ".",
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(unknown_name_message("layout", layout, LAYOUTS))
        if not isinstance(path, str | Path):
            raise ConfigError(f"path of TableSource is {path!r}; expected a file or a folder.")
        self.path = str(path)
        self.layout = layout
        self.columns = dict(columns or {})
        self._universes = universes
        self.freq = None if freq is None else frequency(freq)
        self.adjust = adjust
        self._options = ReadOptions(date_format, timezone, decimal)
        self._root = resolve_path(path)
        if not self._root.exists():
            raise DataError(f"no file or folder {self._root}; check the path of TableSource.")
        if layout in (PER_INSTRUMENT, WIDE) and not self._root.is_dir():
            raise DataError(
                f"layout {layout!r} needs a folder of files, but {self._root} is a file."
            )
        self._names: Mapping[str, str] = {}  # the columns by field, of the first file
        self._panel: Panel | None = None
        self._memberships: Mapping[str, Membership] | None = None
        self._panel_fingerprint: str | None = None

    @property
    def knows_names(self) -> bool:
        if self._panel is not None:
            return True
        return bool(_last_panel) and (str(self._root), self._compute_fingerprint()) in _last_panel

    def panel(self) -> Panel:
        if self._panel is None:
            self._panel_fingerprint = self._compute_fingerprint()
            key = (str(self._root), self._panel_fingerprint)
            panel = _last_panel.get(key)
            if panel is None:
                _last_panel.clear()
                panel = _last_panel[key] = self._read_with_log()
            self._panel = panel
        return self._panel

    def _read_with_log(self) -> Panel:
        try:
            panel = self._read()
        except DataError as error:
            # Add the path for the user; an error about a single file names it already.
            if str(self._root) in str(error):
                raise
            raise DataError(f"{self._root}: {error}") from error
        logger.info("read %s from %s", panel, self._root)
        warn_raw_prices(panel, self._names, str(self._root))
        return panel

    def memberships(self) -> Mapping[str, Membership]:
        if self._memberships is None:
            panel, universes = self.panel(), self._universes
            is_file = isinstance(universes, str | Path)
            if isinstance(universes, str | Path):
                universes = read_memberships(universes, self._options.date_format)
            universes = {"all": span_membership(panel), **(universes or {})}
            self._memberships = Memberships(universes, panel, skip_unknown=is_file)
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
        files = self._files()
        universes: Any = self._universes
        if isinstance(universes, str | Path):
            universes = digest_text(universes)
        elif universes is not None:
            universes = {name: _plain_members(each) for name, each in universes.items()}
        names = [f.relative_to(self._root).as_posix() for f in files]
        contents = [digest_text(file) for file in files]
        parts = [self.layout, self.columns, self.freq or "day", universes, names, contents]
        return digest([*parts, self.adjust, vars(self._options)])

    def _files(self) -> list[Path]:
        """Return the files of bars."""
        if not self._root.is_dir():
            return [self._root]
        files = list_tables(self._root)
        if isinstance(self._universes, str | Path):
            members = resolve_path(self._universes).resolve()
            files = [file for file in files if file.resolve() != members]
        return files

    # -- layouts ---------------------------------------------------------------------------------

    def _read(self) -> Panel:
        files = self._files()
        is_wide = self.layout == WIDE or (self.layout == AUTO and self._looks_wide(files))
        if is_wide:
            return Panel.from_frame(self._adjust_prices(self._read_wide(files)))
        frames = self._read_bars(files)
        return _build_long_panel({f: self._adjust_prices(bars) for f, bars in frames.items()})

    def _adjust_prices(self, bars: pd.DataFrame) -> pd.DataFrame:
        return bars if self.adjust is None else adjust_prices(bars)

    def _looks_wide(self, files: Sequence[Path]) -> bool:
        """Whether a folder's files are named after fields, and their columns are not."""
        if not self._root.is_dir() or not all(usual_field(file_stem(file)) for file in files):
            return False
        columns = list(self._read_table(files[0], ()).columns)
        dates = find_column(columns, self._date_names())
        # Instruments may be called OPEN and LOW, but rarely all of them.
        return not all(usual_field(column) for column in columns if column != dates)

    def _find_layout(self, tables: Mapping[Path, pd.DataFrame]) -> str:
        """Return `long` or `per_instrument`, by the columns of the files."""
        if self.layout != AUTO or not self._root.is_dir():
            return LONG if self.layout == AUTO else self.layout
        names = self._instrument_names()
        without = [f for f, t in tables.items() if find_column(t.columns, names) is None]
        if not without:
            return LONG
        if len(without) < len(tables):
            raise DataError(
                f"{without[0]} has no column for the instrument, but other files have one; set "
                "layout='long' or 'per_instrument', or keep the files in two folders."
            )
        columns = list(tables[without[0]].columns)
        if not self._has_field_mapping() and not any(map(usual_field, columns)):
            raise DataError(
                f"{without[0]} has no column for the instrument and none of a usual field; set "
                "layout='per_instrument' if its columns are fields, or 'wide' if they are "
                f"instruments. Columns: {', '.join(columns[:12])}."
            )
        return PER_INSTRUMENT

    def _read_bars(self, files: Sequence[Path]) -> dict[Path, pd.DataFrame]:
        """Read one row per bar by file; files of `per_instrument` need no column of instruments."""
        names = [self._instrument_names(), self._date_names()]
        tables = {file: self._read_table(file, names) for file in files}
        layout = self._find_layout(tables)
        frames = {}
        for number, (file, table) in enumerate(tables.items()):
            instrument = file_stem(file) if layout == PER_INSTRUMENT else None
            context = self._all_date_texts(tables)
            frames[file] = self._parse_bars(table, file, instrument, context, is_first=number == 0)
        return _select_common_fields(frames) if layout == PER_INSTRUMENT else frames

    def _read_table(self, file: Path, name_columns: Sequence[Any]) -> pd.DataFrame:
        """Read a file, with the columns that the names of its folders add."""
        table = read_table(file, name_columns, decimal=self._options.decimal)
        if self._root.is_dir():
            for column, value in partition_values(file, self._root).items():
                if column not in table:
                    table[column] = pd.Series(value, table.index, dtype="str")
        return table

    def _read_wide(self, paths: Sequence[Path]) -> pd.DataFrame:
        files: dict[str, list[Path]] = {}
        for file in paths:
            files.setdefault(file_stem(file), []).append(file)
        self._names = fields = self._name_fields(list(files), "file of a field")
        for name in fields.values():
            if len(files[name]) > 1:
                first, second = files[name][:2]
                raise DataError(
                    f"{first} and {second} have the same name; layout 'wide' reads one file per "
                    "field. Join them into one table."
                )
        tables = {
            file: self._read_table(file, [self.columns.get(DATETIME, 0)])
            for file in dict.fromkeys(files[name][0] for name in fields.values())
        }
        columns = [
            self._parse_wide_field(
                tables[files[name][0]], files[name][0], self._all_date_texts(tables)
            ).rename(field)
            for field, name in fields.items()
        ]
        return pd.concat(columns, axis=1).sort_index()

    def _parse_wide_field(
        self, table: pd.DataFrame, file: Path, context: Iterator[str]
    ) -> pd.Series:
        """Convert a field's table to a `(datetime, instrument)` Series without its NaN cells."""
        date_column = self._date_column(table, file, is_wide=True)
        dates = self._parse_dates(table[date_column], file, context)
        wide = convert_decimals(table.drop(columns=date_column)).set_axis(dates, axis=0)
        _require_numeric(wide, file)
        if not dates.is_unique:
            date = dates[dates.duplicated()][0]
            raise DataError(f"{file}: the date {date:%Y-%m-%d} has several rows; keep one of them.")
        names = pd.Index([str(c) for c in wide.columns])
        if duplicates := duplicate_names(names):
            raise DataError(f"{file}: some instruments have more than one column: {duplicates}.")
        values = wide.to_numpy(dtype=np.float64, na_value=np.nan).reshape(-1)
        present_cells = np.flatnonzero(~np.isnan(values))
        index = pd.MultiIndex.from_product([dates, names], names=[DATETIME, INSTRUMENT])
        return pd.Series(values[present_cells], index=index[present_cells])

    # -- names -----------------------------------------------------------------------------------

    def _name_fields(self, columns: Sequence[str], kind: str) -> dict[str, str]:
        """Return the columns (or files) to read by their fields."""
        mapping = {field: name for field, name in self.columns.items() if field not in NAMES}
        for name in mapping.values():
            if name not in columns:
                raise DataError(unknown_name_message(kind, name, columns))
        fields = {f.lstrip("$"): name for f, name in mapping.items()} or name_fields(columns)
        if self.adjust is None:
            return fields
        return select_adjusted_close(fields, self.adjust, columns, kind)

    def _instrument_names(self) -> Sequence[str]:
        column = self.columns.get(INSTRUMENT)
        return INSTRUMENT_COLUMNS if column is None else (column,)

    def _date_names(self) -> Sequence[str]:
        column = self.columns.get(DATETIME)
        return DATE_COLUMNS if column is None else (column,)

    def _date_column(self, table: pd.DataFrame, file: Path, *, is_wide: bool = False) -> str:
        if DATETIME in self.columns:
            return _require_column(self.columns[DATETIME], table, file)
        columns = list(table.columns)
        if is_wide:
            # Other columns are instruments, one of which may be called DATE.
            exact_names = [name for name in DATE_COLUMNS if name in columns]
            is_first = find_column(columns[:1], DATE_COLUMNS) is not None
            return columns[0] if is_first or not exact_names else exact_names[0]
        return _usual_column(DATETIME, DATE_COLUMNS, columns, file)

    # -- one file --------------------------------------------------------------------------------

    def _parse_bars(
        self,
        table: pd.DataFrame,
        file: Path,
        instrument: str | None,
        context: Iterator[str],
        *,
        is_first: bool,
    ) -> pd.DataFrame:
        """Convert a file's rows to a `(datetime, instrument)` frame with qtorch's field names.

        `instrument`: that of all rows; None if the file has a column for it. The names of the
        columns are logged for the first file.
        """
        date_column = self._date_column(table, file)
        dates = self._parse_dates(table[date_column], file, context)
        index_columns = {DATETIME: date_column}
        if instrument is None:
            column = self._instrument_column(table, file)
            if table[column].isna().any():
                raise DataError(f"{file}: some rows have no instrument in {column!r}.")
            instruments = text_names(table[column])
            index_columns[INSTRUMENT] = column
        else:
            instruments = pd.Index([instrument] * len(table))
            own_name = find_column(table.columns, self._instrument_names())
            if own_name and set(text_names(table[own_name])) <= {instrument}:
                index_columns[INSTRUMENT] = own_name
        folder_columns = partition_values(file, self._root) if self._root.is_dir() else {}
        ignored = {*index_columns.values(), *folder_columns, *_row_numbers(table)}
        try:
            if self._has_field_mapping():
                fields = self._name_fields(list(table.columns), "column")
            else:
                fields = self._name_fields([c for c in table.columns if c not in ignored], "column")
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        if is_first:
            self._names = fields
            if text := describe_names({**index_columns, **fields}):
                logger.info("columns of %s: %s", file, text)
        bars = convert_decimals(table[list(fields.values())])
        bars.index = pd.MultiIndex.from_arrays([dates, instruments], names=[DATETIME, INSTRUMENT])
        if len(bars):
            _require_numeric(bars, file)
        else:
            bars = bars.astype(np.float64)
        return bars.set_axis(list(fields), axis=1)

    def _has_field_mapping(self) -> bool:
        return not set(self.columns) <= set(NAMES)

    def _instrument_column(self, table: pd.DataFrame, file: Path) -> str:
        if INSTRUMENT in self.columns:
            return _require_column(self.columns[INSTRUMENT], table, file)
        return _usual_column(INSTRUMENT, INSTRUMENT_COLUMNS, list(table.columns), file)

    def _parse_dates(
        self, values: pd.Series, file: Path, context: Iterator[str]
    ) -> pd.DatetimeIndex:
        """Parse a column of dates; raise DataError with its place for one that has none."""
        try:
            dates = self._options.parse_dates(values, context)
        except DataError as error:
            raise DataError(f"{file}, column {values.name!r}: {error}") from error
        if dates.hasnans:
            raise DataError(f"{file}: some rows have no date in {values.name!r}.")
        return dates

    def _all_date_texts(self, tables: Mapping[Path, pd.DataFrame]) -> Iterator[str]:
        """Iterate over the dates of all files, which may tell days and months apart for one."""
        for table in tables.values():
            column = find_column(table.columns, self._date_names())
            yield from date_texts(table[column] if column else table.iloc[:, 0])


def _plain_members(members: Sequence[str] | Mapping[str, Any]) -> list[Any]:
    if not isinstance(members, Mapping):
        return [str(name) for name in members]
    return [[str(n), [[str(a), str(b)] for a, b in spans]] for n, spans in members.items()]


def read_memberships(
    path: str | Path, date_format: str | None = None
) -> dict[str, dict[str, list[tuple[Any, Any]]]]:
    """Read universes from a file with columns universe, instrument and optionally start, end."""
    names = {"universe": UNIVERSE_COLUMNS, "instrument": INSTRUMENT_COLUMNS}
    table = read_spans(path, names, kind="membership", date_format=date_format)
    memberships: dict[str, dict[str, list[tuple[Any, Any]]]] = {}
    for universe, instrument, start, end in table.itertuples(index=False):
        memberships.setdefault(universe, {}).setdefault(instrument, []).append((start, end))
    return memberships


def _select_common_fields(frames: Mapping[Path, pd.DataFrame]) -> dict[Path, pd.DataFrame]:
    """Give all frames the columns of the first, in its order; a missing event is 0."""
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame.columns))
    missing = [
        name
        for name in names
        if name not in EVENT_FIELDS and not all(name in frame for frame in frames.values())
    ]
    if missing:
        raise DataError(
            f"the files do not have the same columns: {missing} are not in all of them. "
            "Name the fields to read with columns={'close': 'close', ...}."
        )
    return {file: frame.reindex(columns=names, fill_value=0.0) for file, frame in frames.items()}


def _build_long_panel(frames: Mapping[Path, pd.DataFrame]) -> Panel:
    """Build a panel from the `(datetime, instrument)` frames of files."""
    parts = [frame for frame in frames.values() if len(frame)]
    if not parts:
        raise DataError("the table has no rows.")
    try:
        return Panel.from_frame(pd.concat(parts) if len(parts) > 1 else parts[0])
    except DuplicateRowError as error:
        rows = _find_rows(frames, (error.date, error.instrument))
        raise error.with_advice(f"keep one of each in the files: {rows}") from error


def _find_rows(frames: Mapping[Path, pd.DataFrame], key: tuple[Any, str]) -> str:
    """Return the files and the numbers of their first rows that have a date and an instrument."""
    rows = []
    for file, frame in frames.items():
        is_date, is_instrument = (frame.index.get_level_values(k) == key[k] for k in (0, 1))
        numbers = np.flatnonzero(is_date & is_instrument)
        rows += [f"row {number + 1} of {file}" for number in numbers]
    return f"{' and '.join(rows[:2])} (the header does not count)"


def _require_column(column: str, table: pd.DataFrame, file: Path) -> str:
    """Return a column of the user's mapping; raise DataError if the file does not have it."""
    if column not in table.columns:
        raise DataError(f"{file}: {unknown_name_message('column', column, table.columns)}")
    return column


def _usual_column(level: str, candidates: Sequence[str], columns: Sequence[str], file: Path) -> str:
    try:
        return require_column(level, candidates, columns)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _row_numbers(table: pd.DataFrame) -> list[str]:
    """Return the columns without a name that number the rows, as `to_csv` writes the index."""
    unnamed = [c for c in table.columns if c.startswith("Unnamed: ")]
    row_numbers = np.arange(len(table))
    return [c for c in unnamed if (pd.to_numeric(table[c], errors="coerce") == row_numbers).all()]


def _require_numeric(table: pd.DataFrame, file: Path) -> None:
    try:
        require_numeric(table)
    except DataError as error:
        hint = "; or set decimal=',' for decimal commas" if has_decimal_commas(table) else ""
        raise DataError(
            f"{file}: {str(error).removesuffix('.')}: "
            f"columns={{'close': 'close', ...}} names those to read{hint}."
        ) from error


def has_decimal_commas(table: pd.DataFrame) -> bool:
    """Whether some cells of text are numbers with a decimal comma."""
    texts = table.select_dtypes(include=["object", "str"])
    return any(texts[c].astype(str).str.fullmatch(r"-?\d+,\d+").any() for c in texts.columns)
