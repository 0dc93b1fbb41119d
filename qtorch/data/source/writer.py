"""Writing bars as a Qlib data folder that Qlib itself can read."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from qtorch.core.errors import DataError
from qtorch.core.session import resolve_path
from qtorch.data.panel.panel import Panel
from qtorch.data.source.base import Membership, Source
from qtorch.data.source.frame import Memberships, Universes, as_source, span_membership
from qtorch.data.source.qlib import folder_name

logger = logging.getLogger(__name__)

# The start row is stored as float32, which represents all integers only up to this number.
_LARGEST_ROW = 2**24


def write_qlib(
    data: Source | Panel | pd.DataFrame,
    folder: str | Path,
    *,
    fields: Sequence[str] | None = None,
    universes: Universes | None = None,
    freq: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a source, a Panel or a `(datetime, instrument)` frame as a Qlib data folder.

    All instruments, dates and universes of the source are written, with all fields or only
    `fields`; `all` has each instrument from its first to its last stored day. `universes` adds
    universes (a list of instruments, or `{instrument: [(start, end), ...]}`). Values are float32.

    Writing is atomic: the files are written to a temporary folder, which is then renamed.
    `overwrite` allows replacing an existing data folder, but never any other kind of folder.

    Returns the folder. Raises DataError if it exists, or if two instruments would share a folder
    (Qlib's folder names are lower case).
    """
    source, target = as_source(data), resolve_path(folder)
    freq = source.resolve_frequency(freq)
    _check_target(target, overwrite)
    names = sorted(source.instrument_names())
    _check_names(names)
    panel = source.load(fields, instruments=names, freq=freq)
    memberships = {name: source.instruments(name) for name in source.universes()}
    memberships |= Memberships(universes or {}, panel)
    memberships["all"] = span_membership(panel)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        _write_files(panel, memberships, temporary, freq)
        _replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    logger.info("wrote %s to %s", panel, target)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{target} exists; choose another folder, or set overwrite=True.")
    if not (target / "calendars").is_dir() or not (target / "features").is_dir():
        raise DataError(f"{target} is not a Qlib data folder, so it is not overwritten.")


def _check_names(names: Sequence[str]) -> None:
    """Check that names are valid as folders and unique in lower case, as Qlib uses them."""
    first_names: dict[str, str] = {}
    for name in names:
        if not name or name != name.strip() or any(c in name for c in "/\\\t\n\0"):
            raise DataError(f"{name!r} cannot be the name of a folder; rename the instrument.")
        first_name = first_names.setdefault(name.lower(), name)
        if first_name != name:
            raise DataError(
                f"{first_name!r} and {name!r} would share one folder; rename one of them."
            )


def _write_files(
    panel: Panel, memberships: Mapping[str, Membership], folder: Path, freq: str
) -> None:
    if len(panel.calendar) > _LARGEST_ROW:
        raise DataError(
            f"the calendar has {len(panel.calendar)} rows, more than Qlib's files support."
        )
    intraday = bool((panel.calendar != panel.calendar.normalize()).any())
    date_format = "%Y-%m-%d %H:%M:%S" if intraday else "%Y-%m-%d"
    for part in ("calendars", "instruments", "features"):
        (folder / part).mkdir()
    lines = panel.calendar.strftime(date_format)
    (folder / "calendars" / f"{freq}.txt").write_text("\n".join(lines) + "\n")
    for universe, membership in memberships.items():
        rows = [
            f"{name}\t{first.strftime(date_format)}\t{last.strftime(date_format)}"
            for name, spans in sorted(membership.items())
            for first, last in spans
        ]
        (folder / "instruments" / f"{universe.lower()}.txt").write_text("\n".join(rows) + "\n")
    spans = panel.spans.tolist()
    paths = [folder / "features" / folder_name(name) for name in panel.instruments]
    for path in paths:
        path.mkdir()
    for field in panel.fields:
        # Instrument-major, so that the values of each file are contiguous.
        column = panel.column(field).T.contiguous().cpu().numpy()
        for path, values, (first, last) in zip(paths, column, spans, strict=True):
            if last < first:
                continue
            content = np.empty(last - first + 2, dtype="<f4")
            content[0], content[1:] = first, values[first : last + 1]
            content.tofile(path / f"{field.lower()}.{freq}.bin")


def _replace_folder(temporary: Path, target: Path) -> None:
    """Rename the finished folder to its target; an old target is restored on error."""
    if not target.exists():
        os.replace(temporary, target)
        return
    backup = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, backup / "old")
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(backup / "old", target)
        raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)
