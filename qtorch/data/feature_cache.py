"""Features that tasks of one machine share: computed once, kept on disk, read by memory map.

An entry is a folder named by a hash of all that its values depend on: the source's content, the
expressions, the universe and its filters, the dates, and the code that computes. It is written
beside its place and renamed, so that it is there whole or not at all; the least recently used go
when the cache is full. An entry that goes while somebody reads it stays readable to him.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from qtorch.core.errors import ConfigError, DataError
from qtorch.core.files import cache_folder
from qtorch.core.heartbeat import beat
from qtorch.data.stored_view import META, bytes_of, read_view, write_view
from qtorch.data.view import View

log = logging.getLogger(__name__)

FOLDER = "features"
BYTES_VARIABLE = "QTORCH_FEATURE_CACHE_BYTES"
DEFAULT_BYTES = 20 * 2**30
FREE_SHARE = 0.05  # of the disk is left free
STALE_SECONDS = 3600.0  # a writer that died left this behind
PATIENCE = 900.0  # the longest that one waits for another's computation
_PART, _GONE, _LOCK = ".part-", ".gone-", ".lock-"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Entry:
    """One entry: what it holds, its bytes, when it was last used (seconds since 1970)."""

    key: str
    num_bytes: int
    used: float
    about: dict[str, Any]


class FeatureCache:
    """Views of features by key, in a folder of at most `max_bytes`.

    `folder`: None is `features` in qtorch's cache folder (QTORCH_CACHE). `max_bytes`: None is
    QTORCH_FEATURE_CACHE_BYTES ("20G"), else 20 GiB. Processes may share a folder: who needs what
    another one computes waits for it. A disk that takes no more costs speed, never the work.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else cache_folder() / FOLDER
        self.max_bytes = _bytes_of_environment() if max_bytes is None else max_bytes

    def get(self, key: str, about: dict[str, Any], *, make: Callable[[], View]) -> View:
        """The view of a key; made and kept if it is not there. `about` is shown to people."""
        found = self._read(key)
        if found is not None:
            return found
        with self._alone(key) as waited:
            # Whoever was first has made it meanwhile.
            found = self._read(key) if waited else None
            if found is not None:
                return found
            view = make()
            kept = self._keep(key, view, about)
        return self._read(key) or view if kept else view

    def entries(self) -> list[Entry]:
        """What there is, the most recently used first."""
        found = []
        for path in self._folders():
            try:
                meta = path / META
                content = json.loads(meta.read_text())
                size = sum(f.stat().st_size for f in path.iterdir())
                found.append(Entry(path.name, size, meta.stat().st_mtime, content["about"]))
            except (OSError, ValueError, KeyError) as error:
                log.debug("%s is no entry of the feature cache: %s", path, error)
        return sorted(found, key=lambda e: -e.used)

    def remove(self, key: str) -> bool:
        """Take an entry out; False where it is not there."""
        path = self.folder / key
        gone = self.folder / f"{_GONE}{key}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            # Who holds the lock keeps it; at worst somebody else computes the same beside him.
            (self.folder / f"{_LOCK}{key}").unlink(missing_ok=True)
            path.rename(gone)  # at once: nobody finds half an entry
        except OSError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True

    def clear(self) -> int:
        """Take every entry out; how many there were."""
        self._sweep(age=0.0)
        return sum(self.remove(path.name) for path in self._folders())

    # -- parts ---------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]

    def _read(self, key: str) -> View | None:
        path = self.folder / key
        try:
            view = read_view(path)
            os.utime(path / META)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            if not path.exists():
                return None
            log.warning(
                "the cached features in %s cannot be read and are made anew: %s", path, error
            )
            self.remove(key)
            return None
        return view

    def _keep(self, key: str, view: View, about: dict[str, Any]) -> bool:
        """Write an entry; False where it does not fit or the disk refuses."""
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{_PART}{key[:8]}-", dir=self.folder))
            needed = bytes_of(view)
            if not self._make_room(needed):
                log.info("the features (%d MiB) do not fit the cache", needed >> 20)
                return False
            write_view(view, partial, about)
            partial.chmod(0o755)
            try:
                partial.rename(self.folder / key)
            except OSError:
                if not (self.folder / key / META).is_file():  # another process was quicker
                    raise
        except (OSError, DataError) as error:
            log.warning("the features are not cached: %s", error)
            return False
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return True

    def _make_room(self, needed: int) -> bool:
        """Let the least recently used entries go until `needed` bytes fit."""
        self._sweep(age=STALE_SECONDS)
        if needed > self.max_bytes:
            return False
        entries = self.entries()
        total = sum(e.num_bytes for e in entries)
        while entries and (total + needed > self.max_bytes or not self._fits_disk(needed)):
            oldest = entries.pop()
            self.remove(oldest.key)
            total -= oldest.num_bytes
        return self._fits_disk(needed)

    def _fits_disk(self, needed: int) -> bool:
        disk = shutil.disk_usage(self.folder)
        return disk.free - needed > FREE_SHARE * disk.total

    def _sweep(self, age: float) -> None:
        """Remove what died in the middle: parts older than `age` seconds."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith((_PART, _GONE)):
                try:
                    old = time.time() - path.stat().st_mtime >= age
                except OSError:
                    continue  # another process removes it
                if old:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Hold a key against other processes; yields whether another one had held it.

        The system frees the lock of a process that dies. Where a folder knows no locks, or its
        holder takes too long, the work is done twice and the first to end counts.
        """
        handle, waited = None, False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.folder / f"{_LOCK}{key}"
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            waited = _locked(handle)
        except OSError as error:
            log.debug("the feature cache goes without a lock: %s", error)
        try:
            yield waited
        finally:
            if handle is not None:
                os.close(handle)


def _locked(handle: int) -> bool:
    """Take the lock of a file; whether it had to be waited for."""
    end, waited = time.monotonic() + PATIENCE, False
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            waited = True
            beat("waiting for features")
            time.sleep(0.05)
    return waited


def _bytes_of_environment() -> int:
    given = os.environ.get(BYTES_VARIABLE, "").strip()
    if not given:
        return DEFAULT_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", given, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{BYTES_VARIABLE}={given!r}: expected a size such as 20G or 500M.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# -- which cache is in use -------------------------------------------------------------------------

_in_use: ContextVar[FeatureCache | None] = ContextVar("qtorch_feature_cache", default=None)


@contextmanager
def caching(given: bool | str | Path) -> Iterator[None]:
    """Loaders inside the block keep their features: True in the default folder, a path there."""
    if given is False:
        yield
        return
    token = _in_use.set(FeatureCache(None if given is True else given))
    try:
        yield
    finally:
        _in_use.reset(token)


def cache_in_use() -> FeatureCache | None:
    """The cache of the innermost `caching` block."""
    return _in_use.get()
