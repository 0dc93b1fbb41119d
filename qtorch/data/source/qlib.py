"""Bars from a data folder in Qlib's file layout."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from qtorch.core.content_digest import file_digest
from qtorch.core.dates import frequency, parse_span_dates
from qtorch.core.errors import ConfigError, DataError, format_count, unknown_name_message
from qtorch.core.session import map_paths, resolve_path, session
from qtorch.core.tables import read_text
from qtorch.data.panel.panel import normalise_calendar
from qtorch.data.source.base import Bars, Membership, Source

logger = logging.getLogger(__name__)

ANY_FREQUENCY = "__DEFAULT_FREQ"  # Qlib's key of a folder that may have bars of any frequency

# Names that Windows reserves for devices; Qlib adds a prefix to such folder names.
RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{k}" for d in ("com", "lpt") for k in range(10))]
)


class QlibSource(Source):
    """Reads a data folder in Qlib's layout, as written by `dump_bin.py` or `write_qlib`.

    The layout is `calendars/<freq>.txt`; `instruments/<universe>.txt` with tab-separated
    instrument, start and end (several lines for an instrument that left and returned); and
    `features/<instrument>/<field>.<freq>.bin`, little-endian float32, whose first value is the
    calendar row of the second value. `*_future` calendars are not read. Feature folders have
    lower-case names; instruments have the case that the instruments files use.

    The stored span of an instrument is from the first to the last row of the loaded fields. An
    instrument of a universe that has no folder is skipped with a warning, as in Qlib.

    `provider_uri` is the folder, or `{frequency: folder}` such as `{"day": ..., "1min": ...}` (the
    universes are those of the first folder, or of that of daily bars); None uses that of
    `qtorch.init`. `freq` is the frequency that is read if none is requested; None means daily bars
    if there are any, else the only frequency. With `strict`, a field that
    ends before another field of the same instrument (loaded or not) is an error, because it
    indicates a truncated file: a dump writes all fields of an instrument over the same span.
    With False the file is read as it is, with a warning.

    Raises DataError for missing folders, files and names, and for `.bin` files of an impossible
    length. Unlike Qlib, unknown universes and fields are errors instead of empty results, and an
    instrument may be called NA.
    """

    def __init__(
        self,
        provider_uri: str | Path | Mapping[str, str | Path] | None = None,
        *,
        strict: bool = True,
        freq: str | None = None,
    ) -> None:
        folder = provider_uri if provider_uri is not None else session().provider_uri
        if not folder:
            raise ConfigError(
                "QlibSource needs a folder: QlibSource(provider_uri='~/.qlib/qlib_data/us_data'), "
                "or qtorch.init(provider_uri=...)."
            )
        self.provider_uri = map_paths(str, folder)
        self.strict = strict
        self.freq = None if freq is None else frequency(freq)
        self._folders = _folders_by_frequency(self.provider_uri)
        self._folder = self._folders.get("day", next(iter(self._folders.values())))
        # By path and the digest of the file, so that a changed file is read again.
        self._calendars: dict[tuple[Path, bytes], pd.DatetimeIndex] = {}
        self._memberships: dict[tuple[Path, bytes], Membership] = {}
        # A task's config must name its data folder, also if it comes from qtorch.init.
        self._arguments = {**self._arguments, "provider_uri": self.provider_uri}
        self._check_folders()

    def _check_folders(self) -> None:
        for folder in self._folders.values():
            if not folder.is_dir():
                raise DataError(
                    f"no data folder {folder}; expected Qlib's layout (calendars, instruments, "
                    "features). Check provider_uri, or write a folder with qtorch.data.write_qlib."
                )
            for name in ("calendars", "instruments", "features"):
                if not (folder / name).is_dir():
                    raise DataError(
                        f"{folder} has no folder {name!r}, so it is not a Qlib data folder; "
                        "provider_uri must be the folder with calendars, instruments and features."
                    )

    def _frequency_folder(self, freq: str) -> Path:
        """Return the folder with the bars of a frequency."""
        if freq in self._folders or ANY_FREQUENCY in self._folders:
            return self._folders.get(freq) or self._folders[ANY_FREQUENCY]
        base_freq = freq.removesuffix("_future")
        if base_freq in self._folders:
            return self._folders[base_freq]
        raise DataError(unknown_name_message("frequency", freq, self._folders))

    def frequencies(self) -> tuple[str, ...]:
        """Return the frequencies with a calendar."""
        stored = {
            freq
            for name, folder in self._folders.items()
            for freq in ([name] if name != ANY_FREQUENCY else _find_frequencies(folder))
        }
        return tuple(sorted(stored))

    # -- calendars and universes -----------------------------------------------------------------

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        folder = self._frequency_folder(freq)
        path = folder / "calendars" / f"{freq}.txt"
        if not path.is_file():
            message = unknown_name_message("frequency", freq, _find_frequencies(folder))
            raise DataError(f"{path.parent}: {message}")
        key = path, file_digest(path)
        if key not in self._calendars:
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            try:
                calendar = normalise_calendar(lines)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
            if not (calendar.is_monotonic_increasing and calendar.is_unique):
                raise DataError(f"{path}: the dates must be ascending and unique.")
            self._calendars[key] = calendar
        return self._calendars[key]

    @property
    def knows_names(self) -> bool:
        return True

    def universes(self) -> tuple[str, ...]:
        paths = (self._folder / "instruments").glob("*.txt")
        return tuple(sorted(p.stem for p in paths if not p.name.startswith(".") and p.is_file()))

    def read_membership(self, universe: str) -> Membership:
        path = self._folder / "instruments" / f"{universe}.txt"
        key = path, file_digest(path)
        if key not in self._memberships:
            self._memberships[key] = _read_instruments(path)
        return self._memberships[key]

    # -- features --------------------------------------------------------------------------------

    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        return tuple(sorted({name for names in self._iterate_fields(freq) for name in names}))

    def find_fields(self, names: Iterable[str], freq: str | None = None) -> frozenset[str]:
        missing = requested = frozenset(names)
        for stored in self._iterate_fields(freq):
            missing = missing.difference(stored)
            if not missing:
                break  # usually in the first folder
        return requested - missing

    def _iterate_fields(self, freq: str | None) -> Iterator[list[str]]:
        """Yield the fields of each instrument."""
        freq = self.resolve_frequency(freq)
        suffix = f".{freq}.bin"
        with os.scandir(self._frequency_folder(freq) / "features") as folders:
            for folder in folders:
                if folder.is_dir():
                    files = os.listdir(folder)
                    yield [n[: -len(suffix)] for n in files if n.endswith(suffix)]

    def _drop_missing_instruments(self, names: list[str], freq: str) -> list[str]:
        features = self._frequency_folder(freq) / "features"
        folders = {p.name for p in features.iterdir()}
        present_names = [n for n in names if folder_name(n) in folders]
        missing = sorted(set(names) - set(present_names))
        if missing:
            logger.warning(
                "%d of %d instruments have no folder in %s and are skipped: %s",
                len(missing),
                len(names),
                features,
                ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else ""),
            )
        if not present_names:
            raise DataError(f"none of the {len(names)} instruments has a folder in {features}.")
        return present_names

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        num_dates, root = len(self.read_calendar(freq)), self._frequency_folder(freq)
        files = [f"{field.lower()}.{freq}.bin" for field in fields]
        n, d = len(instruments), rows.stop - rows.start
        values = np.empty((len(fields), d, n), dtype=np.float32)
        file_spans = np.tile(np.array([num_dates, -1]), (len(fields), n, 1))
        folders = [f"{root}/features/{folder_name(instrument)}" for instrument in instruments]
        for k, name in enumerate(files):
            block = np.full((n, d), np.nan, dtype=np.float32)
            for i, folder in enumerate(folders):
                path = f"{folder}/{name}"
                content = _read_bin(path, num_dates)
                if content is None:
                    continue
                first, data = content
                if not len(data):
                    self._report_truncation(f"{path} has no values")
                    continue
                file_spans[k, i] = first, first + len(data) - 1
                lo, hi = max(first, rows.start), min(first + len(data), rows.stop)
                if lo < hi:
                    block[i, lo - rows.start : hi - rows.start] = data[lo - first : hi - first]
            if (file_spans[k, :, 1] < 0).all():
                raise DataError(
                    f"{root}: {unknown_name_message('field', fields[k], self.fields(freq))}"
                )
            values[k] = block.T
        self._check_ends(file_spans, instruments, files, freq)
        first, last = file_spans[..., 0].min(0), file_spans[..., 1].max(0)
        first[last < 0] = rows.start
        last[last < 0] = rows.start - 1
        spans = torch.from_numpy(np.stack([first, last], 1) - rows.start)
        return Bars(torch.from_numpy(values), spans)

    def _check_ends(
        self, spans: np.ndarray, instruments: Sequence[str], names: Sequence[str], freq: str
    ) -> None:
        """Report files that end before another file of their instrument.

        Such a file was probably truncated while it was written or copied. `spans [F, N, 2]` are the
        first and the last row of each file that was read; the last is -1 if there is no file.
        """
        first_problem, count = "", 0
        num_dates, root = len(self.read_calendar(freq)), self._frequency_folder(freq)
        for i, instrument in enumerate(instruments):
            file_spans = dict(zip(names, spans[:, i].tolist(), strict=True))
            folder = f"{root}/features/{folder_name(instrument)}"
            longest, end = _find_longest_file(folder, file_spans, freq, num_dates)
            ends = {n: last for n, (_, last) in file_spans.items()}
            short_names = [n for n, row in ends.items() if 0 <= row < end]
            count += len(short_names)
            if short_names and not first_problem:
                first_problem = (
                    f"{folder}/{short_names[0]} ends at calendar row {ends[short_names[0]]}, but "
                    f"{longest} of the same instrument at {end}"
                )
        if count:
            self._report_truncation(f"{first_problem} ({format_count(count, 'such file')})")

    def _report_truncation(self, problem: str) -> None:
        """Raise an error if this source is strict, else log a warning."""
        message = f"{problem}; it may be truncated. Write or copy it again"
        if self.strict:
            raise DataError(f"{message}, or read it anyway with QlibSource(..., strict=False).")
        logger.warning("%s.", message)

    # -- content ---------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash the names and bytes of all files; a process reads an unchanged file only once.

        See `qtorch.core.content_digest` for how a changed file is noticed.
        """
        digest = hashlib.sha256()
        for entry, relative in self._files():
            digest.update(relative.encode())
            digest.update(file_digest(entry))
        return digest.hexdigest()[:32]

    def _files(self) -> Iterator[tuple[os.DirEntry[str], str]]:
        for freq, root in self._folders.items():
            # The path of a single folder is left out, so that equal data has an equal hash.
            prefix = "" if len(self._folders) == 1 else f"{freq}/"
            for folder in ("calendars", "instruments"):
                for entry in _entries(root / folder):
                    if entry.name.endswith(".txt"):
                        yield entry, f"{prefix}{folder}/{entry.name}"
            for instrument in _entries(root / "features"):
                if instrument.is_dir():
                    for entry in _entries(instrument.path):
                        if entry.name.endswith(".bin"):
                            yield entry, f"{prefix}features/{instrument.name}/{entry.name}"


def exists_qlib_data(qlib_dir: str | Path) -> bool:
    """Whether a folder has bars in Qlib's layout: calendars, universes and features of them all.

    Corresponds to Qlib's function of that name; unlike it this does not look for the feature folder
    of each instrument, which `QlibSource` reports.
    """
    folder = resolve_path(qlib_dir)
    parts = [folder / name for name in ("calendars", "instruments", "features")]
    if not all(part.is_dir() and any(part.iterdir()) for part in parts):
        return False
    source = QlibSource(folder)
    return all(source.fields(freq) for freq in source.frequencies())


def _folders_by_frequency(provider_uri: str | dict[str, str]) -> dict[str, Path]:
    if isinstance(provider_uri, str):
        return {ANY_FREQUENCY: resolve_path(provider_uri)}
    return {
        ANY_FREQUENCY if freq == ANY_FREQUENCY else frequency(freq): resolve_path(folder)
        for freq, folder in provider_uri.items()
    }


def _find_frequencies(folder: Path) -> list[str]:
    paths = (folder / "calendars").glob("*.txt")
    return sorted(p.stem for p in paths if not p.stem.endswith("future"))


def folder_name(instrument: str) -> str:
    """Return the name of an instrument's folder of features."""
    name = instrument.lower()
    return f"_qlib_{name}" if name in RESERVED else name


def _read_bin(path: str, num_dates: int) -> tuple[int, np.ndarray] | None:
    """Return the first calendar row and the values of one file; None if there is no file."""
    try:
        raw = _read_bytes(path, 4 * num_dates + 8)
    except FileNotFoundError:
        return None
    if len(raw) % 4 or not raw:
        raise DataError(
            f"{path} is truncated: {len(raw)} bytes are not a whole number of float32 values. "
            "Write or copy it again."
        )
    content = np.frombuffer(raw, dtype="<f4")
    first, count = float(content[0]), len(content) - 1
    if not (first >= 0 and first.is_integer()):
        raise DataError(f"{path} is corrupt: its first value must be a calendar row, got {first}.")
    if first + count > num_dates:
        raise DataError(
            f"{path} has {count} values from calendar row {int(first)} on, but the calendar has "
            f"{num_dates} rows. The calendar and this file are from different versions."
        )
    return int(first), content[1:]


def _read_bytes(path: str, size: int) -> bytes:
    """Read a file of less than `size` bytes at once; a file object takes three times as long."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content = part = os.read(descriptor, size)
        while len(part) == size:  # less is all that is left of a file
            part = os.read(descriptor, size)
            content += part
    finally:
        os.close(descriptor)
    return content


def _find_longest_file(
    folder: str, file_spans: Mapping[str, Sequence[int]], freq: str, num_dates: int
) -> tuple[str, int]:
    """Find the file of an instrument that ends last, and its last row.

    `file_spans` are the first and last rows of the files that were read already.
    """
    name = max(file_spans, key=lambda n: file_spans[n][1])
    first, end = file_spans[name]
    if end < 0:
        return name, end  # the instrument stores none of these fields
    # A file that was read is known; one of the size of the longest has the same span.
    suffix, longest_size = f".{freq}.bin", 4 * (end - first + 2)
    for file_name in os.listdir(folder):
        if file_name in file_spans or not file_name.endswith(suffix):
            continue
        size = os.stat(f"{folder}/{file_name}").st_size
        if size != longest_size and size > 4:
            with open(f"{folder}/{file_name}", "rb") as file:
                start = float(np.frombuffer(file.read(4), dtype="<f4")[0])
            row = start + size // 4 - 2
            if end < row < num_dates:
                name, end = file_name, int(row)
    return name, end


def _read_instruments(path: Path) -> Membership:
    """Parse lines of tab-separated instrument, start and end; further columns are ignored.

    A blank end, or one such as 9999-12-31, is open.
    """
    rows: list[list[str]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) < 2 or not parts[0]:
            raise DataError(
                f"{path}, line {number}: expected tab-separated instrument, start and end, "
                f"got {line!r}."
            )
        rows.append([*parts, ""][:3])
    table = pd.DataFrame(rows, columns=["instrument", "start", "end"], dtype=object)
    try:
        texts = [*table["start"], *table["end"]]
        starts = parse_span_dates(table["start"], is_end=False, context=texts)
        ends = parse_span_dates(table["end"], is_end=True, context=texts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    membership: Membership = {}
    for name, start, end in zip(table["instrument"], starts, ends, strict=True):
        membership.setdefault(name, []).append((start, end))
    return membership


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
