"""Storing a view of features as files with checksums, and reading it back by memory map."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.panel.columns import Columns, PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.data.panel.window_columns import StoredWindowColumns, WindowColumns

FORMAT = 2  # since 2: checksums
INSTRUMENTS_PER_WRITE = 64
BLOCK_BYTES, BLOCKS_AT_ONCE = 512, 2**16
META, ARRAYS = "meta.json", "arrays.npz"


def view_num_bytes(view: View) -> int:
    """Return the size of a view on disk; raises DataError as `write_view` does."""
    panels = [_get_panel(columns) for columns in view.groups.values()]
    return 2 * view.rows.numel() + sum(4 * p.values.numel() + p.mask.numel() for p in panels)


def write_view(view: View, folder: Path, summary: dict[str, Any], key: str) -> None:
    """Write a view from a loader to a folder; META is written last and marks it complete.

    `key` identifies the view. Raises DataError for columns that are neither a panel's nor windows
    of one.
    """
    arrays: dict[str, np.ndarray] = {"rows": view.rows.cpu().numpy()}
    if view.history is not view.rows:
        arrays["history"] = view.history.cpu().numpy()
    groups = []
    for k, (name, columns) in enumerate(view.groups.items()):
        groups.append({"group": name, **_write_columns(columns, folder, k, arrays)})
    with (folder / ARRAYS).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # keys are strings
        _sync_file(file)
    names = [ARRAYS, *(group["file"] for group in groups)]
    meta = {
        "format": FORMAT,
        "key": key,
        "about": {**summary, "made": time.time()},
        "instruments": [str(i) for i in view.instruments],
        "groups": groups,
        "checksums": {name: checksum(map_file(folder / name)) for name in names},
    }
    with (folder / META).open("w") as file:
        json.dump({**meta, "digest": _meta_digest(meta)}, file)
        _sync_file(file)


def read_view(folder: Path, key: str) -> View:
    """Read a view; its values are mapped, private to this process but shared until written.

    Every file is compared with its checksum. Raises OSError if a file is missing, and ValueError,
    KeyError or BadZipFile for an older format and for files that are damaged or belong to another
    key.
    """
    meta = json.loads((folder / META).read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"it has format {meta['format']}, expected {FORMAT}")
    if meta.pop("digest") != _meta_digest(meta):
        raise ValueError(f"{META} is damaged")
    if meta["key"] != key:
        raise ValueError(f"it is the entry {meta['key']}")
    checksums = meta["checksums"]
    arrays_file = io.BytesIO(_read_file(folder, ARRAYS, checksums).numpy().tobytes())
    with np.load(arrays_file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    groups = {
        g["group"]: _read_columns(
            g, _read_file(folder, g["file"], checksums), arrays, meta["instruments"]
        )
        for g in meta["groups"]
    }
    rows = torch.from_numpy(arrays["rows"])
    history = torch.from_numpy(arrays["history"]) if "history" in arrays else rows
    return View(groups, rows, history)


def checksum(content: Tensor) -> str:
    """Return a hash of the sums of the 64-bit words of each block of a file's bytes.

    It is much faster than a hash of the bytes, and notices a changed byte, missing or additional
    bytes, and blocks in another order. It does not protect against a deliberate change.
    """
    hasher = hashlib.blake2b(len(content).to_bytes(8, "little"), digest_size=16)
    stop = len(content) // BLOCK_BYTES * BLOCK_BYTES
    words = content[:stop].view(torch.int64).view(-1, BLOCK_BYTES // 8)
    for first in range(0, len(words), BLOCKS_AT_ONCE):
        hasher.update(words[first : first + BLOCKS_AT_ONCE].sum(1).numpy().tobytes())
    hasher.update(content[stop:].numpy().tobytes())
    return hasher.hexdigest()


def _meta_digest(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta).encode(), digest_size=16).hexdigest()


def _read_file(folder: Path, name: str, checksums: dict[str, str]) -> Tensor:
    """Map a file as uint8 `[bytes]` and compare it with its checksum."""
    content = map_file(folder / name)
    if checksum(content) != checksums[name]:
        raise ValueError(f"{name} is damaged: its content does not have the stored checksum")
    return content


def _write_columns(
    columns: Columns, folder: Path, number: int, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    panel = _get_panel(columns)
    entry: dict[str, Any] = {"names": list(columns.names), "file": f"{number}.f32"}
    if isinstance(columns, WindowColumns):
        entry |= {
            "kind": "windows",
            "windowed": list(columns.fields),
            "num_steps": columns.num_steps,
            "lead": columns.lead,
        }
    else:
        entry["kind"] = "rows" if isinstance(columns, StoredWindowColumns) else "panel"
    values = panel.values.permute(1, 0, 2)  # by instrument, so that packing needs no copy
    infinite = torch.zeros(len(panel.fields), dtype=torch.bool)
    with (folder / entry["file"]).open("wb") as file:
        for first in range(0, len(values), INSTRUMENTS_PER_WRITE):
            part = values[first : first + INSTRUMENTS_PER_WRITE].float().contiguous().cpu()
            infinite |= part.isinf().flatten(0, 1).any(0)
            part.numpy().tofile(file)
        _sync_file(file)
    # Stored once, so that readers need not look for infinities.
    entry["finite"] = [name for name, bad in zip(panel.fields, infinite, strict=True) if not bad]
    arrays[f"mask{number}"] = panel.mask.cpu().numpy()
    arrays[f"spans{number}"] = panel.spans.cpu().numpy()
    arrays[f"calendar{number}"] = panel.calendar.as_unit("ns").asi8
    return {**entry, "fields": list(panel.fields), "shape": list(values.shape)}


def _get_panel(columns: Columns) -> Panel:
    panel = columns.plain_panel() if isinstance(columns, PanelColumns | WindowColumns) else None
    if panel is None:
        raise DataError(f"{columns!r} cannot be stored: only unmodified columns of a loader can.")
    return panel


def _read_columns(
    entry: dict[str, Any], content: Tensor, arrays: dict[str, np.ndarray], instruments: list[str]
) -> Columns:
    number = entry["file"].partition(".")[0]
    panel = Panel(
        content.view(torch.float32).view(entry["shape"]).permute(1, 0, 2),
        pd.DatetimeIndex(arrays[f"calendar{number}"].view("datetime64[ns]")),
        instruments,
        entry["fields"],
        mask=torch.from_numpy(arrays[f"mask{number}"]),
        spans=torch.from_numpy(arrays[f"spans{number}"]),
    )
    if entry["kind"] != "windows":
        kind = StoredWindowColumns if entry["kind"] == "rows" else PanelColumns
        return kind(panel, entry["names"], finite_fields=frozenset(entry["finite"]))
    return WindowColumns(
        panel,
        entry["names"],
        fields=entry["windowed"],
        num_steps=entry["num_steps"],
        lead=entry["lead"],
    )


def _sync_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# -- mapped files ----------------------------------------------------------------------------------

# Maps by address. Mapped pages are shared until they are written to, and columns never are.
_maps: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()


class MappedFile(np.memmap):
    """A memory map that remembers which file it was opened on."""

    inode: int


def map_file(path: Path) -> Tensor:
    """Map a file's bytes as uint8 `[bytes]`, private to this process but shared until written."""
    if not path.stat().st_size:
        return torch.empty(0, dtype=torch.uint8)
    mapped_file = MappedFile(path, dtype=np.uint8, mode="c")
    mapped_file.inode = path.stat().st_ino
    _maps[mapped_file.ctypes.data] = mapped_file
    return torch.from_numpy(mapped_file)


def find_mapped_file(storage: Any) -> Path | None:
    """Return the file that a tensor's untyped storage maps from its first byte on.

    None for other memory, and if the file no longer exists.
    """
    mapped_file = _maps.get(storage.data_ptr())
    if mapped_file is None or mapped_file.nbytes != storage.nbytes():
        return None
    path = Path(str(mapped_file.filename))
    try:
        file_stat = path.stat()
    except OSError:
        return None
    is_same_file = (file_stat.st_ino, file_stat.st_size) == (mapped_file.inode, mapped_file.nbytes)
    return path.resolve() if is_same_file else None
