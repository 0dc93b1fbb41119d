"""Writes bars in Qlib's own file layout, so that real Qlib reads them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.core.errors import DataError
from qtorch.data.panel import Panel
from qtorch.data.source.base import Membership, Source, frequency
from qtorch.data.source.frame import as_source, checked_membership, span_membership
from qtorch.data.source.qlib import folder_name

logger = logging.getLogger(__name__)

# float32 counts whole numbers without a gap up to here; the start row stands in a float32.
_LARGEST_ROW = 2**24


def write_qlib(
    data: Source | Panel | pd.DataFrame,
    folder: str | Path,
    *,
    fields: Sequence[str] | None = None,
    universes: Mapping[str, Sequence[str] | Mapping[str, Any]] | None = None,
    freq: str = "day",
    overwrite: bool = False,
) -> Path:
    """Write a source, a Panel or a `(datetime, instrument)` frame as a Qlib data folder.

    All instruments, dates and universes of the source are written, `all` with each instrument's
    first and last stored day, all fields or those named; `universes` adds further ones (a list
    of instruments, or `{instrument: [(start, end), ...]}`). Values are float32.

    The folder appears whole or not at all: it is written beside its place and renamed.
    `overwrite` lets it take the place of an earlier data folder (never of anything else).

    Returns the folder. Raises DataError where it exists, or where two instruments would share a
    folder (Qlib's folders are lower case).
    """
    source, target = as_source(data), Path(folder).expanduser()
    freq = frequency(freq)
    _check_target(target, overwrite)
    names = sorted(source.stored_instruments())
    _check_names(names)
    panel = source.load(fields, instruments=names, freq=freq)
    memberships = {name: source.instruments(name) for name in source.universes()}
    for name, listed in (universes or {}).items():
        memberships[name] = checked_membership(name, listed, panel)
    memberships["all"] = span_membership(panel)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        _write(panel, memberships, temporary, freq)
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    logger.info("wrote %s to %s", panel, target)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{target} exists; choose another folder, or say overwrite=True.")
    if not (target / "calendars").is_dir() or not (target / "features").is_dir():
        raise DataError(f"{target} is no Qlib data folder, so it is not overwritten.")


def _check_names(names: Sequence[str]) -> None:
    """Qlib finds an instrument's folder by its lower-case name."""
    seen: dict[str, str] = {}
    for name in names:
        if not name or name != name.strip() or any(c in name for c in "/\\\t\n\0"):
            raise DataError(f"{name!r} cannot be the name of a folder; rename the instrument.")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise DataError(f"{other!r} and {name!r} would share one folder; rename one of them.")


def _write(panel: Panel, memberships: Mapping[str, Membership], folder: Path, freq: str) -> None:
    if len(panel.calendar) > _LARGEST_ROW:
        raise DataError(f"{len(panel.calendar)} rows are more than Qlib's files can count.")
    intraday = bool((panel.calendar != panel.calendar.normalize()).any())
    form = "%Y-%m-%d %H:%M:%S" if intraday else "%Y-%m-%d"
    for part in ("calendars", "instruments", "features"):
        (folder / part).mkdir()
    lines = panel.calendar.strftime(form)
    (folder / "calendars" / f"{freq}.txt").write_text("\n".join(lines) + "\n")
    for universe, membership in memberships.items():
        rows = [
            f"{name}\t{first.strftime(form)}\t{last.strftime(form)}"
            for name, spans in sorted(membership.items())
            for first, last in spans
        ]
        (folder / "instruments" / f"{universe.lower()}.txt").write_text("\n".join(rows) + "\n")
    spans = panel.spans.tolist()
    paths = [folder / "features" / folder_name(name) for name in panel.instruments]
    for path in paths:
        path.mkdir()
    for field in panel.fields:
        # Instrument-major, so that each file is one contiguous stretch.
        column = panel.column(field).T.contiguous().cpu().numpy()
        for path, values, (first, last) in zip(paths, column, spans, strict=True):
            if last < first:
                continue
            content = np.empty(last - first + 2, dtype="<f4")
            content[0], content[1:] = first, values[first : last + 1]
            content.tofile(path / f"{field.lower()}.{freq}.bin")


def _replace(temporary: Path, target: Path) -> None:
    """Put the finished folder in its place; an earlier one steps aside until that is done."""
    if not target.exists():
        os.replace(temporary, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside / "old")
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(aside / "old", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
