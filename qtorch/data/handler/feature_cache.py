"""A disk cache for features that tasks on one machine share, read by memory map.

An entry is a folder named by a hash of everything that its values depend on: the source's
content, the expressions, the universe and its filters, the dates, and the code that computes
them. It is written to a temporary folder and renamed, so that an entry is either complete or
absent. Every file of an entry is compared with its checksum when the entry is opened; a damaged
entry is computed again. The least recently used entries are evicted when the cache is full. A
process that has mapped an evicted entry can still read it.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.files import cache_folder
from qtorch.core.identity import digest
from qtorch.core.names import import_path
from qtorch.core.session import resolve_path
from qtorch.core.source_files import package_digest
from qtorch.core.trust import StoredText
from qtorch.data.expression.operators import get_operators
from qtorch.data.handler.code_digest import code_digest, is_user_code
from qtorch.data.handler.feature_device import current_feature_device
from qtorch.data.handler.filter import DynamicFilter
from qtorch.data.panel.infinite import is_infinity_allowed
from qtorch.data.panel.stored_view import META, read_view, view_num_bytes, write_view
from qtorch.data.panel.view import View
from qtorch.data.source.base import Source
from qtorch.data.source.derived import DerivedSource
from qtorch.process.heartbeat import beat

log = logging.getLogger(__name__)

FOLDER = "features"
BYTES_VARIABLE = "QTORCH_FEATURE_CACHE_BYTES"
DEFAULT_BYTES = 20 * 2**30
MIN_FREE_SHARE = 0.05  # share of the disk that stays free
STALE_SECONDS = 3600.0  # older temporary folders belong to a dead writer
LOCK_TIMEOUT_SECONDS = 900.0  # how long to wait while another process computes
_PART, _TRASH, _LOCK = ".part-", ".gone-", ".lock-"
# What reading an incomplete or damaged entry raises (RuntimeError: torch, for a wrong shape).
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, BadZipFile)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Entry:
    """A cache entry: its size, its time of last use (seconds since 1970) and a summary."""

    key: str
    num_bytes: int
    last_used: float
    summary: dict[str, Any]


class FeatureCache:
    """Views of features by key, in a folder of at most `max_bytes`.

    `folder`: None is `features` in qtorch's cache folder (QTORCH_CACHE). `max_bytes`: None is
    QTORCH_FEATURE_CACHE_BYTES ("20G"), else 20 GiB. Processes may share a folder: a process waits
    for features that another one is computing. If the disk is full, features are computed without
    being cached.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None) -> None:
        self.folder = resolve_path(folder) if folder else cache_folder() / FOLDER
        self.max_bytes = _read_max_bytes() if max_bytes is None else max_bytes

    def get(
        self,
        key: str,
        summary: dict[str, Any],
        *,
        compute: Callable[[], View],
        is_current: Callable[[], bool] = lambda: True,
    ) -> View:
        """Return the view of a key, computing and storing it if it is not cached.

        `summary` describes the entry in listings. `is_current` is called after the computation
        and tells whether the result still belongs to the key; otherwise it is not stored.
        """
        cached_view = self._load(key)
        if cached_view is not None:
            return cached_view
        with self._key_lock(key) as had_to_wait:
            # The process that held the lock may have stored it in the meantime.
            cached_view = self._load(key) if had_to_wait else None
            if cached_view is not None:
                return cached_view
            view = compute()
            if not is_current():
                log.warning(
                    "features are not cached: the data changed while they were computed from it"
                )
                return view
            is_stored = self._store(key, view, summary)
        # Read it back: mapped memory is shared with the other processes that read the entry.
        return (self._load(key) if is_stored else None) or view

    def entries(self) -> list[Entry]:
        """List the entries, most recently used first."""
        result = []
        for path in self._folders():
            try:
                meta = path / META
                content = json.loads(meta.read_text())
                size = sum(f.stat().st_size for f in path.iterdir())
                result.append(Entry(path.name, size, meta.stat().st_mtime, content["about"]))
            except (OSError, ValueError, KeyError) as error:
                log.debug("%s is not an entry of the feature cache: %s", path, error)
        return sorted(result, key=lambda e: -e.last_used)

    def keys(self) -> list[str]:
        """List the keys of all entries, also of damaged ones."""
        return [path.name for path in self._folders()]

    def find_damage(self) -> dict[str, str]:
        """Compare every entry with its checksums; return what is wrong with the others by key."""
        problems = {}
        for path in self._folders():
            try:
                read_view(path, path.name)
            except READ_ERRORS as error:
                if path.exists():
                    problems[path.name] = str(error)
        return problems

    def remove(self, key: str) -> bool:
        """Remove an entry; return False if it does not exist."""
        path = self.folder / key
        trash = self.folder / f"{_TRASH}{key}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            # The lock's holder keeps it. At worst another process computes the same features
            # at the same time.
            (self.folder / f"{_LOCK}{key}").unlink(missing_ok=True)
            path.rename(trash)  # atomic, so that nobody reads half an entry
        except OSError:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def clear(self) -> int:
        """Remove all entries and return how many there were."""
        self._remove_stale(min_age=0.0)
        return sum(self.remove(key) for key in self.keys())

    # -- parts ---------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]

    def _load(self, key: str) -> View | None:
        path = self.folder / key
        try:
            view = read_view(path, key)
            os.utime(path / META)
        except READ_ERRORS as error:
            if not path.exists():
                return None
            log.warning(
                "cannot use the cached features in %s, computing them again: %s", path, error
            )
            self.remove(key)
            return None
        return view

    def _store(self, key: str, view: View, summary: dict[str, Any]) -> bool:
        """Write an entry; return False if it does not fit or the disk refuses it."""
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{_PART}{key[:8]}-", dir=self.folder))
            num_bytes = view_num_bytes(view)
            if not self._make_room(num_bytes):
                log.info("features (%d MiB) do not fit in the cache", num_bytes >> 20)
                return False
            write_view(view, partial, summary, key)
            partial.chmod(0o755)
            try:
                partial.rename(self.folder / key)
            except OSError:
                if not (self.folder / key / META).is_file():  # else another process stored it first
                    raise
        except (OSError, DataError) as error:
            log.warning("features are not cached: %s", error)
            return False
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return True

    def _make_room(self, num_bytes: int) -> bool:
        """Evict the least recently used entries until `num_bytes` fit."""
        self._remove_stale(min_age=STALE_SECONDS)
        if num_bytes > self.max_bytes:
            return False
        entries = self.entries()
        total = sum(e.num_bytes for e in entries)
        while entries and (total + num_bytes > self.max_bytes or not self._fits_disk(num_bytes)):
            oldest = entries.pop()
            self.remove(oldest.key)
            total -= oldest.num_bytes
        return self._fits_disk(num_bytes)

    def _fits_disk(self, num_bytes: int) -> bool:
        disk = shutil.disk_usage(self.folder)
        return disk.free - num_bytes > MIN_FREE_SHARE * disk.total

    def _remove_stale(self, min_age: float) -> None:
        """Remove temporary folders of dead processes that are at least `min_age` seconds old."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith((_PART, _TRASH)):
                try:
                    is_stale = time.time() - path.stat().st_mtime >= min_age
                except OSError:
                    continue  # another process is removing it
                if is_stale:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _key_lock(self, key: str) -> Iterator[bool]:
        """Lock a key against other processes; yield whether another process had held it.

        The operating system frees the lock of a process that dies. If the file system has no locks,
        or the holder takes too long, both processes compute and the first to finish is stored.
        """
        handle, had_to_wait = None, False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{_LOCK}{key}"
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            had_to_wait = _acquire_lock(handle)
        except OSError as error:
            log.debug("the feature cache works without a lock: %s", error)
        try:
            yield had_to_wait
        finally:
            if handle is not None:
                os.close(handle)


def _acquire_lock(handle: int) -> bool:
    """Acquire the lock of a file; return whether it had to wait for it."""
    end, had_to_wait = time.monotonic() + LOCK_TIMEOUT_SECONDS, False
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return had_to_wait
        except BlockingIOError:
            had_to_wait = True
            beat("waiting for features")
            time.sleep(0.05)
    return had_to_wait


def _read_max_bytes() -> int:
    text = os.environ.get(BYTES_VARIABLE, "").strip()
    if not text:
        return DEFAULT_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{BYTES_VARIABLE}={text!r}: expected a size such as 20G or 500M.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# -- the current cache -----------------------------------------------------------------------------

_current_cache: ContextVar[FeatureCache | None] = ContextVar("qtorch_feature_cache", default=None)


@contextmanager
def use_feature_cache(cache: bool | str | Path) -> Iterator[None]:
    """Cache the features of loaders inside the block (True: in the default folder; or a path).

    A path in stored text stands for the default folder: a stranger must not choose where files are
    written.
    """
    if cache is False:
        yield
        return
    folder = None if cache is True or isinstance(cache, StoredText) else cache
    token = _current_cache.set(FeatureCache(folder))
    try:
        yield
    finally:
        _current_cache.reset(token)


def current_feature_cache() -> FeatureCache | None:
    """Return the cache of the innermost `use_feature_cache` block."""
    return _current_cache.get()


# -- keys -----------------------------------------------------------------------------------------

LOADER_METHODS = ("compute_columns", "group_reach", "group_fields")
# Attributes of every QlibDataLoader. The key contains them in another form, or they act after the
# cache; what a user's class adds is part of the key.
LOADER_ATTRIBUTES = frozenset(
    [
        *("_arguments", "config", "filter_pipe", "freq", "inst_processors", "source"),
        *("_fields", "_filters", "_inst_processors", "_own_source"),
    ]
)


def feature_key(
    loader: Any,
    source: Source,
    *,
    universe: Any,
    start_time: Any,
    end_time: Any,
    freq: str,
    fields: Mapping[str, Mapping[str, str]],
    filters: Sequence[DynamicFilter],
) -> tuple[str, dict[str, Any]] | None:
    """Return the cache key and a summary of the entry; None if the features cannot be cached.

    They cannot be cached if a live object takes part in computing them, or code of the user that
    has no source file, because no hash identifies these.
    """
    dates = source.calendar(start_time, end_time, freq)
    if not len(dates):
        return None  # loading raises a better error
    span = [dates[0].isoformat(), dates[-1].isoformat()]
    try:
        parts = {
            "engine": engine_digest(),
            "code": code_digest(_user_code(loader, source, fields, filters)),
            "source": source.fingerprint(),
            "fields": [[g, list(f.items())] for g, f in fields.items()],
            "computed": [getattr(type(loader), name).__qualname__ for name in LOADER_METHODS],
            "windowed": getattr(loader, "_uses_windows", None),
            "universe": plain_value(universe),
            "filters": [f.to_config() for f in filters],
            "span": span,
            "freq": freq,
            "infinite": is_infinity_allowed(),  # cached data is not checked again
            "device": current_feature_device().type,  # a GPU rounds differently
        }
        key = digest(parts)
    except ConfigError as error:
        log.info("features are not cached: %s", error)
        return None
    universe_text = universe if isinstance(universe, str) else f"{len(universe)} instruments"
    summary = {
        "source": import_path(_source_class(source)).rpartition(".")[2],
        "universe": universe_text,
        "columns": sum(len(f) for f in fields.values()),
        "span": [text[:10] for text in span],
        "freq": freq,
    }
    return key, summary


def _user_code(
    loader: Any,
    source: Source,
    fields: Mapping[str, Mapping[str, str]],
    filters: Sequence[DynamicFilter],
) -> dict[str, Any]:
    """Return the user's objects that take part in computing the features, by name."""
    objects: dict[str, Any] = {
        f"{type(loader).__name__}.{name}": getattr(type(loader), name) for name in LOADER_METHODS
    }
    classes = [type(loader), _source_class(source), *map(type, filters)]
    objects |= {cls.__name__: cls for cls in classes if is_user_code(cls.__module__)}
    if is_user_code(type(loader).__module__):
        added = {k: v for k, v in vars(loader).items() if k not in LOADER_ATTRIBUTES}
        objects[f"a {type(loader).__name__}"] = added
    for k, each in enumerate(filters):
        if is_user_code(type(each).__module__):
            objects[f"filter {k}"] = each
    expressions = [e for part in fields.values() for e in part.values()]
    expressions += [e for each in filters for e in each.expressions()]
    # A user's class may evaluate further expressions.
    names = None if len(objects) > len(LOADER_METHODS) else _operator_names(expressions)
    for name, operator in sorted(get_operators().items()):
        if operator.function is not None and (names is None or name in names):
            arguments = [operator.arguments, operator.returns_condition, operator.min_window]
            arguments += [operator.num_optional, operator.cross_section]
            objects[f"operator {name}"] = [*arguments, operator.reach, operator.function]
    return objects


def _source_class(source: Source) -> type[Source]:
    """Return the class that reads the files."""
    return type(source.source if isinstance(source, DerivedSource) else source)


def _operator_names(expressions: Iterable[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\w+(?=\s*\()", text)}


def engine_digest() -> str:
    """Return a hash of qtorch's code that reads data, and of the versions that compute with it."""
    versions = [torch.__version__, np.__version__, pd.__version__]
    return digest([package_digest("data"), package_digest("core"), *map(str, versions)])
