"""Lossless parquet files for DataFrame and Series: index, columns, names and dtypes are restored.

The columns of the file have readable names (`datetime, instrument, score`), so that any parquet
reader shows the table. Whatever else pandas needs is in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qtorch.core.errors import DataError
from qtorch.core.file_digest import PLACEHOLDER
from qtorch.tracking.lossless_json import NotPlainError, decode, encode

METADATA, DIGEST = b"qtorch", b"qtorch_digest"


class NotTabularError(ValueError):
    """Parquet cannot restore the data exactly."""


def write_frame(data: pd.DataFrame | pd.Series, path: Path, header: dict[str, Any]) -> None:
    """Write a parquet file; NotTabularError, and no file, if it would not be restored exactly.

    `header` is stored in its metadata, together with a placeholder for the file's digest.
    """
    table, layout = _to_table(data)
    sample, _ = _to_table(data.iloc[:2])
    if _signature(_from_table(sample, layout)) != _signature(data.iloc[:2]):
        raise NotTabularError("its dtypes have no equivalent in parquet")
    metadata = json.dumps({**header, "layout": layout})
    dictionary_columns = [f.name for f in table.schema if not pa.types.is_floating(f.type)]
    with pq.ParquetWriter(path, table.schema, use_dictionary=dictionary_columns or False) as writer:
        writer.write_table(table)
        # In this order: the header may contain user's text that looks like a digest.
        writer.add_key_value_metadata({METADATA: metadata, DIGEST: PLACEHOLDER})


def frame_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of `write_frame`; DataError if another program wrote it."""
    metadata = pq.read_metadata(path).metadata or {}
    if METADATA not in metadata:
        raise DataError("it is damaged, or another program wrote it: it has no qtorch metadata.")
    header: dict[str, Any] = json.loads(metadata[METADATA])
    return header


def read_frame(path: Path) -> pd.DataFrame | pd.Series:
    """Read a file of `write_frame`."""
    return _from_table(pq.read_table(path), frame_header(path)["layout"])


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
            layout["dtypes"].append(_describe_dtype(column))
            arrays.append(_to_arrow(column, layout["dtypes"][-1]))
            names.append(_readable_name(label))
    except (NotPlainError, pa.ArrowException, TypeError, ValueError) as error:
        raise NotTabularError(str(error)) from error
    return pa.Table.from_arrays(arrays, names=_deduplicate(names)), layout


def _from_table(table: pa.Table, layout: dict[str, Any]) -> pd.DataFrame | pd.Series:
    num_index = len(layout["index"]["dtypes"])
    index = _decode_index(table, layout["index"], layout["rows"])
    if len(index) != table.num_rows and table.num_columns:
        index = index[: table.num_rows]  # `write_frame` checks the first two rows only
    columns = [
        _from_arrow(table.column(num_index + k), dtype) for k, dtype in enumerate(layout["dtypes"])
    ]
    if layout["series"]:
        series = pd.Series(columns[0], index=index, name=decode(layout["name"]), copy=False)
        series.attrs = decode(layout["attrs"])
        return series
    frame = pd.DataFrame(dict(enumerate(columns)), index=index, copy=False)
    frame.columns = _decode_labels(layout["columns"])
    frame.attrs = decode(layout["attrs"])
    return frame


def _describe_dtype(values: pd.Series | pd.Index) -> Any:
    """Describe a dtype for `_from_arrow`; object cells are stored as strings or as JSON."""
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return {"categories": encode(list(dtype.categories)), "ordered": bool(dtype.ordered)}
    if pd.api.types.is_object_dtype(dtype):
        has_text_only = pd.api.types.infer_dtype(values, skipna=True) == "string"
        # A string array has one kind of missing value, which is read as None.
        is_readable = has_text_only and all(v is None for v in values[values.isna()])
        return "object" if is_readable else "json"
    return str(dtype)


def _to_arrow(values: pd.Series | pd.Index, dtype: Any) -> Any:
    if dtype == "json":
        return pa.array([json.dumps(encode(v)) for v in values], pa.string())
    if isinstance(dtype, dict):
        values = pd.Series(values).astype(values.dtype.categories.dtype)  # type: ignore[union-attr]
    array = pa.Array.from_pandas(values)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _from_arrow(values: pa.ChunkedArray, dtype: Any) -> Any:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if isinstance(dtype, dict):
        labels, is_ordered = decode(dtype["categories"]), dtype["ordered"]
        return pd.Categorical(values.to_pandas(), categories=labels, ordered=is_ordered)
    if dtype in ("object", "json"):
        cells = values.to_pylist()
        array = np.empty(len(cells), dtype=object)
        array[:] = [decode(json.loads(c)) for c in cells] if dtype == "json" else cells
        return array
    return values.to_pandas().astype(dtype).array


def _encode_index(index: pd.Index) -> tuple[list[Any], list[str], dict[str, Any]]:
    layout: dict[str, Any] = {"names": encode(list(index.names)), "dtypes": []}
    if isinstance(index, pd.RangeIndex):
        layout["range"] = _encode_range(index)
        return [], [], layout
    arrays: list[Any] = []
    if isinstance(index, pd.MultiIndex):
        layout["multi"] = True
        for level, codes in zip(index.levels, index.codes, strict=True):
            layout["dtypes"].append(_describe_dtype(level))
            values = _to_arrow(level, layout["dtypes"][-1])
            indices = pa.array(codes, mask=np.asarray(codes) < 0)
            arrays.append(pa.DictionaryArray.from_arrays(indices, values))
    else:
        layout["dtypes"].append(_describe_dtype(index))
        layout["freq"] = index.freqstr if isinstance(index, pd.DatetimeIndex) else None
        arrays.append(_to_arrow(index, layout["dtypes"][-1]))
    names = [f"index_{k}" if n is None else _readable_name(n) for k, n in enumerate(index.names)]
    return arrays, names, layout


def _decode_index(table: pa.Table, layout: dict[str, Any], rows: int) -> Any:
    names = decode(layout["names"])
    if "range" in layout:
        start, stop, step = layout["range"]
        return pd.RangeIndex(start, stop, step, name=names[0])[:rows]
    if not layout.get("multi"):
        values = _from_arrow(table.column(0), layout["dtypes"][0])
        if layout["freq"]:
            return pd.DatetimeIndex(values, freq=layout["freq"], name=names[0])
        return pd.Index(values, name=names[0])
    levels, codes = [], []
    for k, dtype in enumerate(layout["dtypes"]):
        array = table.column(k).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0)
        if not pa.types.is_dictionary(array.type):
            array = array.dictionary_encode()
        level = pd.Index(_from_arrow(pa.chunked_array([array.dictionary]), dtype))
        level_codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.intp)
        order = level.argsort()
        new_position = np.empty(len(level) + 1, dtype=np.intp)
        new_position[order] = np.arange(len(level))
        new_position[-1] = -1
        levels.append(level[order])
        codes.append(new_position[level_codes])
    return pd.MultiIndex(levels=levels, codes=codes, names=names)


def _encode_labels(columns: pd.Index) -> dict[str, Any]:
    is_multi = isinstance(columns, pd.MultiIndex)
    levels = columns.levels if isinstance(columns, pd.MultiIndex) else [columns]
    return {
        "names": encode(list(columns.names)),
        "labels": encode([list(v) for v in columns] if is_multi else list(columns)),
        "dtypes": [_describe_dtype(level) for level in levels],
        "multi": is_multi,
        "range": _encode_range(columns) if isinstance(columns, pd.RangeIndex) else None,
    }


def _encode_range(index: pd.RangeIndex) -> list[int]:
    return [index.start, index.stop, index.step]


def _decode_labels(layout: dict[str, Any]) -> Any:
    names, labels, dtypes = decode(layout["names"]), decode(layout["labels"]), layout["dtypes"]
    if layout["range"]:
        start, stop, step = layout["range"]
        return pd.RangeIndex(start, stop, step, name=names[0])
    if not layout["multi"]:
        return _build_labels(labels, dtypes[0]).rename(names[0])
    parts = list(zip(*labels, strict=True)) if labels else [()] * len(dtypes)
    arrays = [_build_labels(list(v), d) for v, d in zip(parts, dtypes, strict=True)]
    return pd.MultiIndex.from_arrays(arrays, names=names)


def _build_labels(values: list[Any], dtype: Any) -> Any:
    if isinstance(dtype, dict):
        labels, is_ordered = decode(dtype["categories"]), dtype["ordered"]
        return pd.Index(pd.Categorical(values, categories=labels, ordered=is_ordered))
    return pd.Index(values, dtype="object" if dtype == "json" else dtype)


def _readable_name(label: Any) -> str:
    return "/".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _deduplicate(names: list[str]) -> list[str]:
    used: set[str] = set()
    for k, name in enumerate(names):
        number, candidate = 1, name
        while candidate in used:
            number += 1
            candidate = f"{name}.{number}"
        used.add(candidate)
        names[k] = candidate
    return names


def _signature(data: Any) -> Any:
    """Summarize everything but the values that reading must restore: types, names and dtypes."""

    def dtype_signature(dtype: Any) -> Any:
        if isinstance(dtype, pd.CategoricalDtype):
            return "category", list(dtype.categories), dtype.ordered
        return str(dtype)

    def index_signature(index: pd.Index) -> Any:
        levels = index.levels if isinstance(index, pd.MultiIndex) else [index]
        return type(index), list(index.names), [dtype_signature(level.dtype) for level in levels]

    if isinstance(data, pd.Series):
        return "series", dtype_signature(data.dtype), data.name, index_signature(data.index)
    columns = index_signature(data.columns), list(data.columns)
    return "frame", [dtype_signature(d) for d in data.dtypes], columns, index_signature(data.index)
