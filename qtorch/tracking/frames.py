"""DataFrame and Series as parquet and back: index, columns, names and dtypes as they were.

The columns of the file carry readable names (`datetime, instrument, score`), so that any parquet
reader shows the table; what pandas needs beyond them lies in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qtorch.tracking.plain import NotPlainError, decode, encode

METADATA = b"qtorch"


class NotTabularError(ValueError):
    """The frame holds what parquet cannot give back as it was."""


def write_frame(data: pd.DataFrame | pd.Series, path: Path, header: dict[str, Any]) -> None:
    """Write a parquet file; NotTabularError, and no file, where it would not come back equal."""
    table, layout = _to_table(data)
    sample, _ = _to_table(data.iloc[:2])
    if _signature(_from_table(sample, layout)) != _signature(data.iloc[:2]):
        raise NotTabularError("its dtypes have no counterpart in parquet")
    held = json.dumps({**header, "layout": layout})
    table = table.replace_schema_metadata({METADATA: held.encode()})
    repeating = [f.name for f in table.schema if not pa.types.is_floating(f.type)]
    pq.write_table(table, path, use_dictionary=repeating or False)


def frame_header(path: Path) -> dict[str, Any] | None:
    """The header given to `write_frame`; None for a parquet file of another writer."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata[METADATA]) if METADATA in metadata else None


def read_frame(path: Path) -> pd.DataFrame | pd.Series:
    """What `write_frame` wrote; a parquet file of another writer as pandas reads it."""
    header = frame_header(path)
    if header is None:
        return pd.read_parquet(path)
    return _from_table(pq.read_table(path), header["layout"])


def _to_table(data: pd.DataFrame | pd.Series) -> tuple[pa.Table, dict[str, Any]]:
    frame = data.to_frame(name="value") if isinstance(data, pd.Series) else data
    try:
        layout: dict[str, Any] = {"series": isinstance(data, pd.Series), "rows": len(frame)}
        layout["name"] = encode(data.name) if isinstance(data, pd.Series) else None
        layout["attrs"] = encode(dict(data.attrs))
        layout["columns"] = _encode_labels(frame.columns)
        arrays, names, layout["index"] = _encode_index(frame.index)
        layout["dtypes"] = []
        labels = [data.name] if isinstance(data, pd.Series) else list(frame.columns)
        for k, label in enumerate(labels):
            column = frame.iloc[:, k]
            layout["dtypes"].append(_dtype_of(column))
            arrays.append(_arrow(column, layout["dtypes"][-1]))
            names.append(_readable(label))
    except (NotPlainError, pa.ArrowException, TypeError, ValueError) as error:
        raise NotTabularError(str(error)) from error
    return pa.Table.from_arrays(arrays, names=_distinct(names)), layout


def _from_table(table: pa.Table, layout: dict[str, Any]) -> pd.DataFrame | pd.Series:
    num_index = len(layout["index"]["dtypes"])
    index = _decode_index(table, layout["index"], layout["rows"])
    if len(index) != table.num_rows and table.num_columns:
        index = index[: table.num_rows]  # the two rows that `write_frame` tries out
    columns = [
        _restore(table.column(num_index + k), dtype) for k, dtype in enumerate(layout["dtypes"])
    ]
    if layout["series"]:
        series = pd.Series(columns[0], index=index, name=decode(layout["name"]), copy=False)
        series.attrs = decode(layout["attrs"])
        return series
    frame = pd.DataFrame(dict(enumerate(columns)), index=index, copy=False)
    frame.columns = _decode_labels(layout["columns"])
    frame.attrs = decode(layout["attrs"])
    return frame


def _dtype_of(values: pd.Series | pd.Index) -> Any:
    """What `_restore` needs besides the arrow values; objects are strings or JSON cell by cell."""
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return {"categories": encode(list(dtype.categories)), "ordered": bool(dtype.ordered)}
    if pd.api.types.is_object_dtype(dtype):
        kind = pd.api.types.infer_dtype(values, skipna=True)
        return "object" if kind == "string" and all(v is None for v in _missing(values)) else "json"
    return str(dtype)


def _missing(values: pd.Series | pd.Index) -> list[Any]:
    return list(values[values.isna()])


def _arrow(values: pd.Series | pd.Index, dtype: Any) -> Any:
    if dtype == "json":
        return pa.array([json.dumps(encode(v)) for v in values], pa.string())
    if isinstance(dtype, dict):
        values = pd.Series(values).astype(values.dtype.categories.dtype)  # type: ignore[union-attr]
    array = pa.Array.from_pandas(values)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _restore(held: pa.ChunkedArray, dtype: Any) -> Any:
    if pa.types.is_dictionary(held.type):
        held = held.cast(held.type.value_type)
    if isinstance(dtype, dict):
        labels, ordered = decode(dtype["categories"]), dtype["ordered"]
        return pd.Categorical(held.to_pandas(), categories=labels, ordered=ordered)
    if dtype in ("object", "json"):
        cells = held.to_pylist()
        array = np.empty(len(cells), dtype=object)
        array[:] = [decode(json.loads(c)) for c in cells] if dtype == "json" else cells
        return array
    return held.to_pandas().astype(dtype).array


def _encode_index(index: pd.Index) -> tuple[list[Any], list[str], dict[str, Any]]:
    layout: dict[str, Any] = {"names": encode(list(index.names)), "dtypes": []}
    if isinstance(index, pd.RangeIndex):
        layout["range"] = [index.start, index.stop, index.step]
        return [], [], layout
    arrays: list[Any] = []
    if isinstance(index, pd.MultiIndex):
        layout["multi"] = True
        for level, codes in zip(index.levels, index.codes, strict=True):
            layout["dtypes"].append(_dtype_of(level))
            values = _arrow(level, layout["dtypes"][-1])
            indices = pa.array(codes, mask=np.asarray(codes) < 0)
            arrays.append(pa.DictionaryArray.from_arrays(indices, values))
    else:
        layout["dtypes"].append(_dtype_of(index))
        layout["freq"] = index.freqstr if isinstance(index, pd.DatetimeIndex) else None
        arrays.append(_arrow(index, layout["dtypes"][-1]))
    names = [f"index_{k}" if n is None else _readable(n) for k, n in enumerate(index.names)]
    return arrays, names, layout


def _decode_index(table: pa.Table, layout: dict[str, Any], rows: int) -> Any:
    names = decode(layout["names"])
    if "range" in layout:
        start, stop, step = layout["range"]
        return pd.RangeIndex(start, stop, step, name=names[0])[:rows]
    if not layout.get("multi"):
        values = _restore(table.column(0), layout["dtypes"][0])
        if layout["freq"]:
            return pd.DatetimeIndex(values, freq=layout["freq"], name=names[0])
        return pd.Index(values, name=names[0])
    levels, codes = [], []
    for k, dtype in enumerate(layout["dtypes"]):
        held = table.column(k).combine_chunks()
        if isinstance(held, pa.ChunkedArray):
            held = held.chunk(0)
        if not pa.types.is_dictionary(held.type):
            held = held.dictionary_encode()
        level = pd.Index(_restore(pa.chunked_array([held.dictionary]), dtype))
        taken = held.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.intp)
        order = level.argsort()
        place = np.empty(len(level) + 1, dtype=np.intp)
        place[order] = np.arange(len(level))
        place[-1] = -1
        levels.append(level[order])
        codes.append(place[taken])
    return pd.MultiIndex(levels=levels, codes=codes, names=names)


def _encode_labels(columns: pd.Index) -> dict[str, Any]:
    values = [list(v) for v in columns] if isinstance(columns, pd.MultiIndex) else list(columns)
    if isinstance(columns, pd.MultiIndex):
        dtypes = [_dtype_of(level) for level in columns.levels]
    else:
        dtypes = [_dtype_of(columns)]
    return {
        "names": encode(list(columns.names)),
        "labels": encode(values),
        "dtypes": dtypes,
        "multi": isinstance(columns, pd.MultiIndex),
        "range": [columns.start, columns.stop, columns.step]
        if isinstance(columns, pd.RangeIndex)
        else None,
    }


def _decode_labels(layout: dict[str, Any]) -> Any:
    names, labels, dtypes = decode(layout["names"]), decode(layout["labels"]), layout["dtypes"]
    if layout["range"]:
        start, stop, step = layout["range"]
        return pd.RangeIndex(start, stop, step, name=names[0])
    if not layout["multi"]:
        return _labels(labels, dtypes[0]).rename(names[0])
    parts = list(zip(*labels, strict=True)) if labels else [()] * len(dtypes)
    arrays = [_labels(list(v), d) for v, d in zip(parts, dtypes, strict=True)]
    return pd.MultiIndex.from_arrays(arrays, names=names)


def _labels(values: list[Any], dtype: Any) -> Any:
    if isinstance(dtype, dict):
        labels, ordered = decode(dtype["categories"]), dtype["ordered"]
        return pd.Index(pd.Categorical(values, categories=labels, ordered=ordered))
    return pd.Index(values, dtype="object" if dtype == "json" else dtype)


def _readable(label: Any) -> str:
    return "/".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _distinct(names: list[str]) -> list[str]:
    taken: set[str] = set()
    for k, name in enumerate(names):
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}.{number}"
        taken.add(free)
        names[k] = free
    return names


def _signature(data: Any) -> Any:
    """What must come back besides the values."""

    def of_dtype(dtype: Any) -> Any:
        if isinstance(dtype, pd.CategoricalDtype):
            return "category", list(dtype.categories), dtype.ordered
        return str(dtype)

    def of_index(index: pd.Index) -> Any:
        levels = index.levels if isinstance(index, pd.MultiIndex) else [index]
        return type(index), list(index.names), [of_dtype(level.dtype) for level in levels]

    if isinstance(data, pd.Series):
        return "series", of_dtype(data.dtype), data.name, of_index(data.index)
    columns = of_index(data.columns), list(data.columns)
    return "frame", [of_dtype(d) for d in data.dtypes], columns, of_index(data.index)
