"""Bars in Qlib's own file layout."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.session import session
from qtorch.data.panel import normalise_calendar
from qtorch.data.source.base import Bars, Membership, Source

logger = logging.getLogger(__name__)

# Names that Windows keeps for devices; Qlib puts a prefix before such a folder.
RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{k}" for d in ("com", "lpt") for k in range(10))]
)

_digests: dict[tuple[str, int, int], bytes] = {}


class QlibSource(Source):
    """Reads a folder in Qlib's layout, as `dump_bin.py` or `write_qlib` writes it.

    `calendars/<freq>.txt`, `instruments/<universe>.txt` (instrument, start, end between tabs,
    several lines an instrument where it left and came back) and
    `features/<instrument>/<field>.<freq>.bin` (float32 little endian, the first value being the
    calendar row of the second). `*_future` calendars are not read. Folders carry lower-case
    names, instruments the case of the instruments files.

    An instrument's stored span runs from the first to the last row of the fields loaded. One
    that a universe names but that has no folder yields nothing, with a warning, as in Qlib.

    `provider_uri`: the folder; None takes that of `qtorch.init`. `strict`: refuse a field that
    ends before another field of its instrument, loaded or not, as a cut file does (a dump writes
    all fields of an instrument over one span); False reads it as it is, with a warning.

    Raises DataError (one line: what, where, how to mend) for folders, files and names that are
    missing and for `.bin` files of impossible length. Unlike Qlib, unknown universes and fields
    are errors rather than empty, and an instrument called NA is one.
    """

    def __init__(self, provider_uri: str | Path | None = None, *, strict: bool = True) -> None:
        given = provider_uri if provider_uri is not None else session().provider_uri
        if given is None:
            raise ConfigError(
                "QlibSource needs a folder: QlibSource(provider_uri='~/.qlib/qlib_data/us_data'), "
                "or qtorch.init(provider_uri=...)."
            )
        self.provider_uri = str(given)
        self.strict = strict
        self._folder = Path(given).expanduser()
        self._calendars: dict[str, pd.DatetimeIndex] = {}
        self._memberships: dict[str, Membership] = {}
        # A task carries its data source, also where the default gave it.
        self._arguments = {**self._arguments, "provider_uri": self.provider_uri}
        self._check_folders()

    def _check_folders(self) -> None:
        if not self._folder.is_dir():
            raise DataError(
                f"no data folder {self._folder}; expected Qlib's layout (calendars, instruments, "
                "features) there. Check provider_uri, or write one with qtorch.data.write_qlib."
            )
        for name in ("calendars", "instruments", "features"):
            if not (self._folder / name).is_dir():
                raise DataError(
                    f"{self._folder} has no folder {name!r}, so it is no Qlib data folder; "
                    "provider_uri must name the folder that holds calendars, instruments, features."
                )

    # -- calendars and universes -----------------------------------------------------------------

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        if freq not in self._calendars:
            path = self._folder / "calendars" / f"{freq}.txt"
            if not path.is_file():
                found = [p.stem for p in path.parent.glob("*.txt") if not p.stem.endswith("future")]
                raise DataError(f"{path.parent}: {unknown_name('frequency', freq, found)}")
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            calendar = normalise_calendar(lines)
            if not (calendar.is_monotonic_increasing and calendar.is_unique):
                raise DataError(f"{path}: the dates must ascend and stand once each.")
            self._calendars[freq] = calendar
        return self._calendars[freq]

    def universes(self) -> tuple[str, ...]:
        return tuple(sorted(p.stem for p in (self._folder / "instruments").glob("*.txt")))

    def read_membership(self, universe: str) -> Membership:
        if universe not in self._memberships:
            path = self._folder / "instruments" / f"{universe}.txt"
            self._memberships[universe] = _read_instruments(path)
        return self._memberships[universe]

    # -- features --------------------------------------------------------------------------------

    @cached_property
    def _folders(self) -> frozenset[str]:
        return frozenset(p.name for p in (self._folder / "features").iterdir())

    def fields(self, freq: str = "day") -> tuple[str, ...]:
        end = f".{freq}.bin"
        found: set[str] = set()
        for folder in (self._folder / "features").iterdir():
            found.update(p.name[: -len(end)] for p in folder.glob(f"*{end}"))
        return tuple(sorted(found))

    def _stored(self, names: list[str], freq: str) -> list[str]:
        stored = [n for n in names if folder_name(n) in self._folders]
        missing = sorted(set(names) - set(stored))
        if missing:
            logger.warning(
                "%d of %d instruments have no folder in %s and yield nothing: %s",
                len(missing),
                len(names),
                self._folder / "features",
                ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else ""),
            )
        if not stored:
            raise DataError(
                f"none of the {len(names)} instruments has a folder in {self._folder / 'features'}."
            )
        return stored

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        num_dates = len(self.read_calendar(freq))
        files = [f"{field.lower()}.{freq}.bin" for field in fields]
        n, d = len(instruments), rows.stop - rows.start
        values = np.empty((len(fields), d, n), dtype=np.float32)
        reach = np.tile(np.array([num_dates, -1]), (len(fields), n, 1))
        for k, name in enumerate(files):
            block = np.full((n, d), np.nan, dtype=np.float32)
            for i, instrument in enumerate(instruments):
                path = f"{self._folder}/features/{folder_name(instrument)}/{name}"
                stored = _read_bin(path, num_dates)
                if stored is None:
                    continue
                first, data = stored
                if not len(data):
                    self._cut(f"{path} holds no value")
                    continue
                reach[k, i] = first, first + len(data) - 1
                lo, hi = max(first, rows.start), min(first + len(data), rows.stop)
                if lo < hi:
                    block[i, lo - rows.start : hi - rows.start] = data[lo - first : hi - first]
            if (reach[k, :, 1] < 0).all():
                raise DataError(
                    f"{self._folder}: {unknown_name('field', fields[k], self.fields(freq))}"
                )
            values[k] = block.T
        self._check_ends(reach[..., 1], instruments, files, freq)
        first, last = reach[..., 0].min(0), reach[..., 1].max(0)
        first[last < 0] = rows.start
        last[last < 0] = rows.start - 1
        spans = torch.from_numpy(np.stack([first, last], 1) - rows.start)
        return Bars(torch.from_numpy(values), spans)

    def _check_ends(
        self, last: np.ndarray, instruments: Sequence[str], names: Sequence[str], freq: str
    ) -> None:
        """A file that stops before its siblings was cut while it was written or copied.

        `last [F, N]` is the last row of each file that was read, -1 for none.
        """
        found, count = "", 0
        for i, instrument in enumerate(instruments):
            ends = dict(zip(names, last[:, i].tolist(), strict=True))
            folder = f"{self._folder}/features/{folder_name(instrument)}"
            longest, end = _longest(folder, ends, freq, len(self.read_calendar(freq)))
            short = [n for n, row in ends.items() if 0 <= row < end]
            count += len(short)
            if short and not found:
                found = (
                    f"{folder}/{short[0]} ends at calendar row {ends[short[0]]}, {longest} of the "
                    f"same instrument at {end}"
                )
        if count:
            self._cut(f"{found} ({count} such file{'s' if count > 1 else ''})")

    def _cut(self, found: str) -> None:
        """An error where this source is strict, else a warning."""
        message = f"{found}: cut in the middle? Write it again"
        if self.strict:
            raise DataError(f"{message}, or read it as it is with QlibSource(..., strict=False).")
        logger.warning("%s.", message)

    # -- content ---------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A hash of every file's bytes; within a process, unchanged files are hashed once."""
        digest = hashlib.sha256()
        for entry, relative in self._files():
            digest.update(relative.encode())
            digest.update(_digest_of(entry))
        return digest.hexdigest()[:32]

    def _files(self) -> Iterator[tuple[os.DirEntry[str], str]]:
        for folder in ("calendars", "instruments"):
            for entry in _entries(self._folder / folder):
                if entry.name.endswith(".txt"):
                    yield entry, f"{folder}/{entry.name}"
        for instrument in _entries(self._folder / "features"):
            if instrument.is_dir():
                for entry in _entries(instrument.path):
                    if entry.name.endswith(".bin"):
                        yield entry, f"features/{instrument.name}/{entry.name}"


class _Stored(NamedTuple):
    first: int
    data: np.ndarray


def folder_name(instrument: str) -> str:
    """The folder of an instrument's features."""
    lowered = instrument.lower()
    return f"_qlib_{lowered}" if lowered in RESERVED else lowered


def _read_bin(path: str, num_dates: int) -> _Stored | None:
    """One field of one instrument; None where no file is."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return None
    if len(raw) % 4 or not raw:
        raise DataError(
            f"{path} is cut in the middle: {len(raw)} bytes are no whole number of float32 values. "
            "Write or copy it again."
        )
    content = np.frombuffer(raw, dtype="<f4")
    first, count = float(content[0]), len(content) - 1
    if not (first >= 0 and first.is_integer()):
        raise DataError(f"{path} is damaged: its first value, a calendar row, is {first}.")
    if first + count > num_dates:
        raise DataError(
            f"{path} holds {count} values from calendar row {int(first)} on, but the calendar has "
            f"{num_dates} rows. The calendar or this file is of another version."
        )
    return _Stored(int(first), content[1:])


def _longest(folder: str, read: Mapping[str, int], freq: str, num_dates: int) -> tuple[str, int]:
    """The file of an instrument that ends last, and the row where; `read` are known ends."""
    name = max(read, key=lambda n: read[n])
    end = read[name]
    if end < 0:
        return name, end  # it stores none of these fields
    sizes = {e.name: e.stat().st_size for e in _entries(folder) if e.name.endswith(f".{freq}.bin")}
    alike = {sizes[n] for n in read if n in sizes}  # of one size, of one span: nothing to open
    for other, size in sizes.items():
        if size not in alike and size > 4:
            with open(f"{folder}/{other}", "rb") as file:
                first = float(np.frombuffer(file.read(4), dtype="<f4")[0])
            row = first + size // 4 - 2
            if end < row < num_dates:
                name, end = other, int(row)
    return name, end


def _read_instruments(path: Path) -> Membership:
    """`instrument, start, end` between tabs; further columns are ignored."""
    membership: Membership = {}
    names: list[str] = []
    dates: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.rstrip("\r\n").split("\t")
        if len(parts) < 3:
            raise DataError(
                f"{path}, line {number}: expected instrument, start and end between tabs, "
                f"got {line!r}."
            )
        names.append(parts[0].strip())
        dates += parts[1:3]
    try:
        stamps = list(normalise_calendar(dates))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    for k, name in enumerate(names):
        membership.setdefault(name, []).append((stamps[2 * k], stamps[2 * k + 1]))
    return membership


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name."""
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _digest_of(entry: os.DirEntry[str]) -> bytes:
    """The hash of a file, remembered by its size and time of change."""
    stat = entry.stat()
    key = (entry.path, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with open(entry.path, "rb") as file:
            _digests[key] = hashlib.blake2b(file.read(), digest_size=16).digest()
    return _digests[key]
