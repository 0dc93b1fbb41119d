"""A view of features as files, read back by memory map."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.columns import Columns, PanelColumns
from qtorch.data.mapped import map_file
from qtorch.data.panel import Panel
from qtorch.data.view import View
from qtorch.data.window_columns import WindowColumns

FORMAT = 1
AT_ONCE = 64  # instruments that are written together
META, ARRAYS = "meta.json", "arrays.npz"


def bytes_of(view: View) -> int:
    """What a view takes on disk; DataError as `write_view` raises."""
    panels = [_panel_of(columns) for columns in view.groups.values()]
    return 2 * view.rows.numel() + sum(4 * p.values.numel() + p.mask.numel() for p in panels)


def write_view(view: View, folder: Path, about: dict[str, Any]) -> None:
    """Write a view as a loader makes it; META comes last and makes it whole.

    Raises DataError for columns that are neither a panel's nor windows of one.
    """
    arrays: dict[str, np.ndarray] = {"rows": view.rows.cpu().numpy()}
    if view.history is not view.rows:
        arrays["history"] = view.history.cpu().numpy()
    groups = []
    for k, (name, columns) in enumerate(view.groups.items()):
        groups.append({"group": name, **_write_columns(columns, folder, k, arrays)})
    with (folder / ARRAYS).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its names are strings
        _to_disk(file)
    meta = {
        "format": FORMAT,
        "about": {**about, "made": time.time()},
        "instruments": [str(i) for i in view.instruments],
        "groups": groups,
    }
    with (folder / META).open("w") as file:
        json.dump(meta, file)
        _to_disk(file)


def read_view(folder: Path) -> View:
    """The view again; its values are mapped, private to this process and shared until written.

    Raises OSError where a file is missing, ValueError, KeyError or BadZipFile for files that are
    not whole.
    """
    meta = json.loads((folder / META).read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, expected {FORMAT}")
    with np.load(folder / ARRAYS, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    groups = {
        g["group"]: _read_columns(g, folder, arrays, meta["instruments"]) for g in meta["groups"]
    }
    rows = torch.from_numpy(arrays["rows"])
    history = torch.from_numpy(arrays["history"]) if "history" in arrays else rows
    return View(groups, rows, history)


def _write_columns(
    columns: Columns, folder: Path, number: int, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    panel = _panel_of(columns)
    told: dict[str, Any] = {"names": list(columns.names), "file": f"{number}.f32"}
    if isinstance(columns, WindowColumns):
        told |= {
            "kind": "windows",
            "windowed": list(columns.fields),
            "num_steps": columns.num_steps,
            "lead": columns.lead,
        }
    else:
        told["kind"] = "panel"
    values = panel.values.permute(1, 0, 2)  # by instrument: packing needs no copy
    infinite = torch.zeros(len(panel.fields), dtype=torch.bool)
    with (folder / told["file"]).open("wb") as file:
        for first in range(0, len(values), AT_ONCE):
            part = values[first : first + AT_ONCE].float().contiguous().cpu()
            infinite |= part.isinf().flatten(0, 1).any(0)
            part.numpy().tofile(file)
        _to_disk(file)
    # Told once, so that no reader has to look for infinities.
    told["finite"] = [name for name, bad in zip(panel.fields, infinite, strict=True) if not bad]
    arrays[f"mask{number}"] = panel.mask.cpu().numpy()
    arrays[f"spans{number}"] = panel.spans.cpu().numpy()
    arrays[f"calendar{number}"] = panel.calendar.as_unit("ns").asi8
    return {**told, "fields": list(panel.fields), "shape": list(values.shape)}


def _panel_of(columns: Columns) -> Panel:
    panel = columns.bare_panel() if isinstance(columns, PanelColumns | WindowColumns) else None
    if panel is None:
        raise DataError(f"{columns!r} is more than a loader makes: it cannot be stored.")
    return panel


def _read_columns(
    told: dict[str, Any], folder: Path, arrays: dict[str, np.ndarray], instruments: list[str]
) -> Columns:
    number = told["file"].partition(".")[0]
    panel = Panel(
        _mapped(folder / told["file"], tuple(told["shape"])).permute(1, 0, 2),
        pd.DatetimeIndex(arrays[f"calendar{number}"].view("datetime64[ns]")),
        instruments,
        told["fields"],
        mask=torch.from_numpy(arrays[f"mask{number}"]),
        spans=torch.from_numpy(arrays[f"spans{number}"]),
    )
    if told["kind"] == "panel":
        return PanelColumns(panel, told["names"], finite=frozenset(told["finite"]))
    return WindowColumns(
        panel,
        told["names"],
        fields=told["windowed"],
        num_steps=told["num_steps"],
        lead=told["lead"],
    )


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    size = 4 * int(np.prod(shape))
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected {size}")
    return map_file(path).view(torch.float32).view(shape)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
