"""The usual spellings of columns: dates, instruments, prices; case and punctuation do not count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qtorch.core.errors import DataError
from qtorch.core.tables import find_column, spelling_key

DATETIME, INSTRUMENT = "datetime", "instrument"

DATE_COLUMNS = (
    *(DATETIME, "date", "time", "timestamp", "trade_date", "trading_date", "trade_day"),
    *("date_time", "open_time", "日期", "交易日期", "时间"),
    "Unnamed: 0",  # as pandas calls a column without a name, such as an index
)
INSTRUMENT_COLUMNS = (
    *(INSTRUMENT, "symbol", "ticker", "code", "ts_code", "stock_code", "sec_code", "tic", "permno"),
    *("isin", "asset", "security", "股票代码", "证券代码", "代码", "name"),
)
UNIVERSE_COLUMNS = ("universe", "market", "index", "pool")
START_COLUMNS = ("start", "start_date", "start_time", "start_datetime", "from", "in_date")
END_COLUMNS = ("end", "end_date", "end_time", "end_datetime", "to", "out_date")
ADJUSTED_CLOSE = "adj_close"
# What happened to an instrument; a file without such a column, as yfinance writes it, had none.
EVENT_FIELDS = ("dividends", "stock_splits", "capital_gains")

_FIELD_SPELLINGS = {
    "open": ("open", "open_price", "开盘", "开盘价"),
    "high": ("high", "high_price", "最高", "最高价"),
    "low": ("low", "low_price", "最低", "最低价"),
    "close": ("close", "close_price", "收盘", "收盘价"),
    "volume": ("volume", "vol", "成交量"),
    "amount": ("amount", "成交额"),
    "vwap": ("vwap",),
    "factor": ("factor",),
    "change": ("change",),
    "dividends": ("dividends", "dividend"),
    "stock_splits": ("stock_splits",),
    "capital_gains": ("capital_gains",),
    ADJUSTED_CLOSE: (ADJUSTED_CLOSE, "adjusted_close", "adj_close_price", "close_adj"),
}
_FIELDS_BY_KEY = {
    spelling_key(name): field for field, names in _FIELD_SPELLINGS.items() for name in names
}


def usual_field(column: str) -> str | None:
    """Return the field that a column usually contains by its name, None if it is no usual one."""
    return _FIELDS_BY_KEY.get(spelling_key(column))


def name_fields(columns: Iterable[str]) -> dict[str, str]:
    """Return `{field: column}` for columns without a mapping of the user's.

    A usual spelling becomes its field, unless another column has just that name or came first.
    Other columns keep their names, without `$`, and with underscores where an expression could not
    name them.
    """
    columns = list(columns)
    exact_names = {column.lstrip("$") for column in columns}
    fields: dict[str, str] = {}
    for column in columns:
        name = column.lstrip("$")
        field = usual_field(name)
        if field is None or (field != name and (field in exact_names or field in fields)):
            field = _field_name(name)
        fields[field if field not in fields else name] = column
    return fields


def _field_name(name: str) -> str:
    """Return a name that an expression can contain: `stock_splits` for `Stock Splits`."""
    if name.isidentifier():
        return name
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    field = "_".join(words)
    return field if field.isidentifier() else name


def require_column(level: str, candidates: Sequence[str], columns: Sequence[str]) -> str:
    """Return the column of the dates or instruments; raise DataError if there is none."""
    column = find_column(columns, candidates)
    if column is None:
        raise DataError(
            f"no column for the {level}; set it with columns={{{level!r}: ...}}. "
            f"Columns: {', '.join(list(columns)[:12])}."
        )
    return column


def describe_names(names: Mapping[str, str]) -> str:
    """Return the columns that were read under other names, as text for the log."""
    return ", ".join(f"{column} as {name}" for name, column in names.items() if column != name)
