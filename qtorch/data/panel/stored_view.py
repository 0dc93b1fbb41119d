"""Storing a view of features as files, and reading it back by memory map."""

from __future__ import annotations

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
from qtorch.data.panel.window_columns import WindowColumns

FORMAT = 1
INSTRUMENTS_PER_WRITE = 64
META, ARRAYS = "meta.json", "arrays.npz"


def view_num_bytes(view: View) -> int:
    """Return the size of a view on disk; raises DataError as `write_view` does."""
    panels = [_get_panel(columns) for columns in view.groups.values()]
    return 2 * view.rows.numel() + sum(4 * p.values.numel() + p.mask.numel() for p in panels)


def write_view(view: View, folder: Path, summary: dict[str, Any]) -> None:
    """Write a view from a loader to a folder; META is written last and marks it complete.

    Raises DataError for columns that are neither a panel's nor windows of one.
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
    meta = {
        "format": FORMAT,
        "about": {**summary, "made": time.time()},
        "instruments": [str(i) for i in view.instruments],
        "groups": groups,
    }
    with (folder / META).open("w") as file:
        json.dump(meta, file)
        _sync_file(file)


def read_view(folder: Path) -> View:
    """Read a view; its values are mapped, private to this process but shared until written.

    Raises OSError if a file is missing, and ValueError, KeyError or BadZipFile for files that are
    incomplete.
    """
    meta = json.loads((folder / META).read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, expected {FORMAT}")
    with np.load(folder / ARRAYS, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    groups = {
        g["group"]: _read_columns(g, folder, arrays, meta["instruments"]) for g in meta["groups"]
    }
    rows = torch.from_numpy(arrays["rows"])
    history = torch.from_numpy(arrays["history"]) if "history" in arrays else rows
    return View(groups, rows, history)


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
        entry["kind"] = "panel"
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
    entry: dict[str, Any], folder: Path, arrays: dict[str, np.ndarray], instruments: list[str]
) -> Columns:
    number = entry["file"].partition(".")[0]
    panel = Panel(
        _map_values(folder / entry["file"], tuple(entry["shape"])).permute(1, 0, 2),
        pd.DatetimeIndex(arrays[f"calendar{number}"].view("datetime64[ns]")),
        instruments,
        entry["fields"],
        mask=torch.from_numpy(arrays[f"mask{number}"]),
        spans=torch.from_numpy(arrays[f"spans{number}"]),
    )
    if entry["kind"] == "panel":
        return PanelColumns(panel, entry["names"], finite_fields=frozenset(entry["finite"]))
    return WindowColumns(
        panel,
        entry["names"],
        fields=entry["windowed"],
        num_steps=entry["num_steps"],
        lead=entry["lead"],
    )


def _map_values(path: Path, shape: tuple[int, ...]) -> Tensor:
    size = 4 * int(np.prod(shape))
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected {size}")
    return map_file(path).view(torch.float32).view(shape)


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
