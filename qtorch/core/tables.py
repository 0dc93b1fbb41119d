"""Read parquet and CSV files, and frames of other libraries, so that names stay text."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import numpy as np
import pandas as pd

from qtorch.core.errors import ConfigError, DataError, join_names, unknown_name_message

NameColumn: TypeAlias = str | int | Collection[str]
"""A column's name, its position, or alternative names, of which the first in the file is meant."""

# pandas' own list; to treat some columns differently, it must be passed for the others.
MISSING_VALUES = [
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
]
PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*PARQUET_SUFFIXES, *CSV_SUFFIXES)
HEAD_BYTES = 2**20  # three header lines of 5000 tickers with six fields fit
SEPARATORS = (",", ";", "\t", "|")
# Spelling keys (see `spelling_key`) by which the level of instruments in grouped columns is known:
# by the level's name, or because the other level has the names of prices.
INSTRUMENT_LEVELS = {"ticker", "tickers", "symbol", "symbols", "instrument", "code", "asset"}
PRICE_FIELDS = {"open", "high", "low", "close", "adjclose", "volume", "vwap"}
_EXCEL_TEXT = re.compile(r'^="(.*)"$')  # how Excel keeps the zeros of "000001"
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


# -- text and CSV ----------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte-order mark.

    Raises DataError for another encoding.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode(_find_encoding(content))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8.") from error


def _find_encoding(content: bytes) -> str:
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return "utf-16" if is_utf16 else "utf-8-sig"  # with or without its byte-order mark


def read_csv(
    path: str | Path, name_columns: Iterable[NameColumn], *, decimal: str = "."
) -> pd.DataFrame:
    """Read a CSV file; the values of `name_columns` stay text as written.

    An instrument may be called NA, null, TRUE or 000001, so in these columns only an empty cell is
    missing. Columns that the file does not have are ignored. The separator (comma, semicolon, tab
    or bar) is that of the first line; gzip and byte-order marks are recognised by the content.
    `decimal`: the decimal point of the numbers.

    A header of two lines, as pandas writes grouped columns, is recognised. Columns by field and
    instrument, such as those of yfinance, become one row per date and instrument; others, such as
    ("feature", "ROC5"), stay grouped, with an index. Raises DataError for a file that is not UTF-8,
    and for a header of one line with the same name twice.
    """
    lines, options = _inspect_csv(path)
    options |= {"decimal": decimal, "low_memory": False, "skipinitialspace": True}
    try:
        header = _find_grouped_header(lines, options["sep"])
        if header is not None:
            return _read_grouped_csv(path, header, options)
        _refuse_repeated_names(path, lines, options["sep"])
        table: pd.DataFrame
        columns = list(pd.read_csv(path, nrows=0, **options).columns)
        names = _present_names(columns, name_columns)
        table = pd.read_csv(
            path,
            dtype=dict.fromkeys(names, str),
            keep_default_na=False,
            na_values={c: [""] if c in names else MISSING_VALUES for c in columns},
            **options,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8.") from error
    for column in names:
        table[column] = _strip_names(table[column])
    table = table.set_axis([str(column).strip() for column in table.columns], axis=1)
    return table


def _inspect_csv(path: str | Path) -> tuple[list[str], dict[str, Any]]:
    """Return the first lines of a CSV file, and pandas' options for its compression and so on."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
        content = file.read(HEAD_BYTES)
    encoding = _find_encoding(content)
    lines = content.decode(encoding, "replace").lstrip("\r\n").splitlines()[:4]
    options = {"encoding": encoding, "compression": "gzip" if is_gzip else None}
    separator_line = re.fullmatch(r'"?sep=(.)"?', lines[0]) if lines else None  # Excel's own
    if separator_line:
        return lines[1:], {**options, "sep": separator_line.group(1), "skiprows": 1}
    return lines, {**options, "sep": _find_separator(lines[0] if lines else "")}


def _refuse_repeated_names(path: str | Path, lines: Sequence[str], separator: str) -> None:
    """Raise DataError for a repeated column name; pandas would call the second one `name.1`."""
    names = [cell.strip() for cell in next(csv.reader(lines[:1], delimiter=separator), [])]
    repeated = {name for name in names if name and names.count(name) > 1}
    if repeated:
        raise DataError(
            f"{path}: several columns have the name {join_names(sorted(repeated))!r}; rename or "
            "remove all but one."
        )


def _find_separator(line: str) -> str:
    """Return the separator that occurs most often in a line, outside of quotes."""
    return max(SEPARATORS, key=re.sub(r'"[^"]*"', "", line).count)


@dataclass(frozen=True)
class _GroupedHeader:
    """A CSV file's header of two lines: the numbers of index columns and of lines to skip."""

    num_index: int
    num_lines: int
    level_names: tuple[str | None, str | None]
    index_names: list[Any]


def _find_grouped_header(lines: Sequence[str], separator: str) -> _GroupedHeader | None:
    """Recognise the header of grouped columns; None for a header of one line.

    pandas writes two lines of names, and usually a third one with the names of the index alone. A
    second line that could be one of numbers counts only if the first one repeats its names.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines[:3], delimiter=separator)]
    if len(rows) < 2 or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return None
    first, second, third = rows if len(rows) == 3 else [*rows, [""]]
    num_named = next((k for k, cell in enumerate(third) if not cell), len(third))
    has_index_line = not any(third[num_named:]) and _is_text(third[:num_named])
    is_named = spelling_key(second[0]) in INSTRUMENT_LEVELS
    repeats_names = len(set(first[num_named:])) < len(first[num_named:])
    if has_index_line and 0 < num_named < len(third) and all(first[num_named:]):
        if is_named or repeats_names or _is_text(second[num_named:]):
            names = (first[0] or None, second[0] or None)
            return _GroupedHeader(num_named, 3, names, third[:num_named])
        return None
    return _find_two_lines(first, second)


def _find_two_lines(first: list[str], second: list[str]) -> _GroupedHeader | None:
    """Recognise a header without the line that names the index."""
    levels: tuple[str | None, str | None] = (None, None)
    num_index = next((k for k, cell in enumerate(second) if cell), 0)
    index_names: list[Any] = [cell or None for cell in first[:num_index]]
    if {spelling_key(first[0]), spelling_key(second[0])} & INSTRUMENT_LEVELS:
        levels, num_index, index_names = (first[0], second[0]), 1, [None]
    groups, members = first[num_index:], second[num_index:]
    has_one_member = len(set(members)) == 1 < len(members) and _is_text(members)
    is_grouped = len(set(groups)) < len(groups) or has_one_member
    if num_index and is_grouped and all(groups) and all(members):
        return _GroupedHeader(num_index, 2, levels, index_names)
    return None


def _is_text(cells: Sequence[str]) -> bool:
    """Whether no cell is empty or looks like a number or a date."""
    return all(cell and not re.match(r"[-+.]?\d", cell) for cell in cells)


def _read_grouped_csv(
    path: str | Path, header: _GroupedHeader, options: Mapping[str, Any]
) -> pd.DataFrame:
    """Read a CSV file whose columns are grouped; see `read_csv`."""
    texts: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
    names: pd.DataFrame = pd.read_csv(path, nrows=2, **texts, **options)
    index = list(range(header.num_index))
    numbers: dict[str, Any] = {
        **options,
        "header": None,
        "skiprows": options.get("skiprows", 0) + header.num_lines,
        "dtype": dict.fromkeys(index, str),
        "keep_default_na": False,
        "na_values": {k: [""] if k in index else MISSING_VALUES for k in range(names.shape[1])},
    }
    table: pd.DataFrame = pd.read_csv(path, **numbers)
    for k in index:
        table[k] = _strip_names(table[k])
    table = table.set_index(index).rename_axis(index=header.index_names)
    levels = [names.iloc[k, header.num_index :].str.strip().tolist() for k in (0, 1)]
    table.columns = pd.MultiIndex.from_arrays(levels, names=list(header.level_names))
    return _stack_instruments(table).reset_index() if has_instrument_columns(table) else table


def has_instrument_columns(table: pd.DataFrame) -> bool:
    """Whether a frame by date has columns by field and instrument, in either order."""
    return table.index.nlevels == 1 and _instrument_level(table.columns) is not None


def _instrument_level(columns: pd.Index) -> int | None:
    """Return which of two levels of columns contains instruments; None if neither is known to."""
    if columns.nlevels != 2:
        return None
    for level, name in enumerate(columns.names):
        if spelling_key(name) in INSTRUMENT_LEVELS:
            return level
    has_prices = [
        any(spelling_key(name) in PRICE_FIELDS for name in columns.get_level_values(level))
        for level in (0, 1)
    ]
    return has_prices.index(False) if any(has_prices) and not all(has_prices) else None


def _stack_instruments(table: pd.DataFrame) -> pd.DataFrame:
    """Convert columns by field and instrument to one row per date and instrument."""
    if table.columns.has_duplicates:
        names = table.columns[table.columns.duplicated()].unique()
        raise DataError(
            f"several columns have the name {names[0]}; rename or remove all but one, e.g. with "
            "frame.loc[:, ~frame.columns.duplicated()]."
        )
    level = _instrument_level(table.columns)
    stacked: Any = table.stack(level, future_stack=True).dropna(how="all")
    index_names = [table.index.name or "Date", "Ticker"]
    frame: pd.DataFrame = stacked.rename_axis(index=index_names, columns=None)
    return frame


def _present_names(columns: Sequence[str], name_columns: Iterable[NameColumn]) -> set[str]:
    names = []
    for column in name_columns:
        if isinstance(column, int):
            names.append(columns[column])
        else:
            alternatives = (column,) if isinstance(column, str) else column
            names += filter(None, [find_column(columns, alternatives)])
    return set(names)


def _strip_names(names: pd.Series) -> pd.Series:
    """Strip spaces and Excel's quotes; what is empty then is missing."""
    codes, uniques = pd.factorize(names)
    texts = np.asarray(uniques, dtype=object).tolist()  # a list is faster to read than Arrow's
    stripped = [text.strip() for text in texts]
    if any(text.startswith("=") for text in stripped):
        stripped = [_EXCEL_TEXT.sub(r"\1", text) for text in stripped]
    if stripped == texts:
        return names
    stripped = [text or None for text in stripped]
    return pd.Series([*stripped, None], dtype="str").take(codes).set_axis(names.index)


# -- columns ---------------------------------------------------------------------------------------


def spelling_key(name: object) -> str:
    """Return a name's letters and digits in lower case: one key for `Adj Close` and `adj_close`."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def find_column(columns: Iterable[str], alternatives: Iterable[str]) -> str | None:
    """Return the first of the alternative names that the columns have, as written there.

    A name as written comes before one that differs in case, spaces or punctuation.
    """
    columns = list(columns)
    by_key: dict[str, str] = {}
    for column in columns:
        by_key.setdefault(spelling_key(column), column)
    for name in alternatives:
        if name in columns:
            return name
        if spelling_key(name) in by_key:
            return by_key[spelling_key(name)]
    return None


# -- parquet and CSV -------------------------------------------------------------------------------


def read_table(
    path: Path,
    name_columns: Iterable[NameColumn] = (),
    *,
    decimal: str = ".",
    keeps_index: bool = False,
) -> pd.DataFrame:
    """Read a parquet or CSV file; a stored index becomes columns, and column names are text.

    With `keeps_index` the index of a parquet file, and levels of its columns, stay as stored.
    Raises DataError for a file that is neither, or is damaged. See `read_csv` for the arguments.
    """
    if not is_table(path):
        raise DataError(
            f"{path} is not a table; expected a file that ends in {', '.join(SUFFIXES)}."
        )
    try:
        if _is_parquet(path):
            table = _read_parquet(path)
        else:
            table = read_csv(path, name_columns, decimal=decimal)
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table: {str(error).strip()}") from error
    return table if keeps_index else index_to_columns(table)


def read_indexed_table(path: Path) -> pd.DataFrame:
    """Read a table whose index is its first column, or the index that a parquet file stores.

    The index has names as text.
    """
    if _is_parquet(path):
        table = _read_parquet(path)
        has_names = not pd.api.types.is_numeric_dtype(table.dtypes.iloc[0])
    else:
        table, has_names = read_table(path, [0]), True
    if isinstance(table.index, pd.RangeIndex) and has_names:
        table = table.set_index(table.columns[0])
    return table.set_axis(text_names(table.index), axis=0)


def index_to_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose named index levels, or index of dates, are columns with text as names.

    A level of instruments in the columns, as in the frames of yfinance, becomes a column too.
    Raises DataError for other columns of two levels.
    """
    if has_instrument_columns(table):
        table = _stack_instruments(table)
    if table.columns.nlevels > 1:
        raise DataError(
            f"the columns have {table.columns.nlevels} levels (the first is "
            f"{table.columns[0]}), of which none is known to contain instruments. Write one row "
            "per date and instrument, with a column for each field; or, if the columns are by "
            "field and instrument, call the level of the instruments 'Ticker' "
            "(frame.columns.names = ['Price', 'Ticker'])."
        )
    if isinstance(table.index, pd.DatetimeIndex) and table.index.name is None:
        table = table.rename_axis(index="datetime")
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    return table.set_axis([str(c) for c in table.columns], axis=1)


def _read_parquet(path: Path) -> pd.DataFrame:
    # The file alone: what the names of its folders say is read by `partition_values`.
    table: pd.DataFrame = pd.read_parquet(path, partitioning=None)
    return table


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(PARQUET_SUFFIXES)


def is_table(path: Path) -> bool:
    """Whether a file has the name of a parquet or CSV file."""
    return path.name.lower().endswith(SUFFIXES)


def list_tables(folder: Path) -> list[Path]:
    """Return the tables in a folder and its subfolders, sorted by path.

    Hidden files and folders are left out, as are folders that begin with an underscore, in which
    other programs keep their own files.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if is_table(path) and path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    if not files:
        raise DataError(f"{folder} has no table; expected files that end in {', '.join(SUFFIXES)}.")
    return files


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or any(p.startswith((".", "_")) for p in path.parts[:-1])


def file_stem(path: Path) -> str:
    """Return a file's name without its suffix (`BRK.B` for `BRK.B.csv`)."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def partition_values(path: Path, root: Path) -> dict[str, str | None]:
    """Return what folders such as `symbol=AAA/year=2020` between `root` and a file say, as text."""
    values: dict[str, str | None] = {}
    for part in path.relative_to(root).parts[:-1]:
        key, equals, value = part.partition("=")
        if equals:
            values[unquote(key)] = None if value == _NO_PARTITION else unquote(value)
    return values


# -- frames and values -----------------------------------------------------------------------------


def is_frame(data: object) -> bool:
    """Whether data is a pandas DataFrame, or one of another library that Arrow can read."""
    return isinstance(data, pd.DataFrame) or hasattr(data, "__arrow_c_stream__")


def as_pandas(data: Any) -> pd.DataFrame:
    """Return a frame of pandas, polars or another library that Arrow can read as a pandas one.

    Raises DataError for anything else.
    """
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pd.Series):
        return data.to_frame()
    if not hasattr(data, "__arrow_c_stream__"):
        kind = f"{type(data).__module__}.{type(data).__qualname__}"
        method = ".collect()" if hasattr(data, "collect") else ".to_pandas()"
        raise DataError(f"expected a pandas DataFrame, got {kind}; convert it, e.g. with {method}.")
    import pyarrow as pa

    frame: pd.DataFrame = pa.table(data).to_pandas()
    return frame


def text_names(names: Sequence[Any] | pd.Series | pd.Index) -> pd.Index:
    """Return names, such as instruments, as text; whole numbers have no decimal point.

    A missing name stays missing.

    Raises DataError for truth values, which have lost the spelling of a name such as TRUE.
    """
    if isinstance(names, pd.Series | pd.Index) and isinstance(names.dtype, pd.StringDtype):
        text_index: pd.Index = pd.Index(names)
        return text_index
    codes, uniques = pd.factorize(pd.Series(names, dtype=None if len(names) else object))
    texts = [*_iterate_names(np.asarray(uniques, dtype=object).tolist()), None]
    unique_names: pd.Index = pd.Index(texts, dtype="str")
    result: pd.Index = unique_names.take(codes)  # the code of a missing name is -1
    return result


def _iterate_names(names: Iterable[Any]) -> Iterator[str]:
    for name in names:
        if isinstance(name, str):
            yield str(name)
        elif isinstance(name, bytes):
            yield name.decode("utf-8", "replace")
        elif str(name) in ("True", "False"):
            raise DataError(
                f"the name {name} is a truth value; read names as text, e.g. with "
                "pd.read_csv(path, dtype={'instrument': str}, keep_default_na=False)."
            )
        elif isinstance(name, float) and name.is_integer():
            yield str(int(name))
        else:
            yield str(name)


def find_stored_name(name: Any, stored_names: Collection[str], kind: str) -> str:
    """Return a name of a configuration as it is stored; `kind` says of what it is the name.

    YAML reads names without quotes as numbers, truth values or dates. A whole number means the name
    of its digits if that is stored. Raises ConfigError for all others that are not text, and
    DataError for a name that is not stored.
    """
    is_whole = isinstance(name, int | np.integer) and not isinstance(name, bool)
    if not isinstance(name, str):
        if is_whole and str(name) in stored_names:
            return str(name)
        raise ConfigError(not_text_message(name, kind))
    if name not in stored_names:
        raise DataError(unknown_name_message(kind, name, stored_names, limit=8))
    return str(name)


def not_text_message(name: Any, kind: str) -> str:
    """Return the error message for a name that is not text, with what YAML may have done to it."""
    octal = ""
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        octal = f" (YAML reads 00{name:o} without quotes as the octal number {name})"
    return (
        f"the {kind} {name!r} is not text{octal}; write a name that looks like a number, a date or "
        'a truth value in quotes: "000300" in a YAML file, \'option="000300"\' on the command '
        "line."
    )


def convert_decimals(table: pd.DataFrame) -> pd.DataFrame:
    """Return a frame whose columns of decimal numbers are floats; other columns are unchanged."""
    kinds = ("decimal", "mixed-integer-float", "floating", "integer")
    columns = [
        k
        for k in range(table.shape[1])
        if table.dtypes.iloc[k] is np.dtype(object)
        and pd.api.types.infer_dtype(table.iloc[:, k], skipna=True) in kinds
    ]
    if not columns:
        return table
    parts = [
        table.iloc[:, k].map(_as_float) if k in columns else table.iloc[:, k]
        for k in range(table.shape[1])
    ]
    return pd.concat(parts, axis=1).set_axis(table.columns, axis=1)


def _as_float(value: Any) -> float:
    return float("nan") if value is None or value is pd.NA else float(value)
