"""Atomic file writes, file locks, and the folder for cached files."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qtorch.core.errors import FileLockError
from qtorch.core.session import resolve_path

PARTIAL_SUFFIX = ".part"


def cache_folder() -> Path:
    """Return the cache folder: QTORCH_CACHE, else $XDG_CACHE_HOME/qtorch or ~/.cache/qtorch."""
    folder = os.environ.get("QTORCH_CACHE")
    if folder:
        return resolve_path(folder)
    return resolve_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qtorch"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` if the block succeeds.

    The content is synced to disk before the rename, so that a crash leaves either the old or the
    new file. If the block raises, the temporary file is deleted and the error is raised again.
    `remove_partial_files` deletes the temporary files of killed processes.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(PARTIAL_SUFFIX, f".{target.name}.", target.parent)
    temporary = Path(name)
    try:
        # The lock tells `remove_partial_files` that this writer is alive. Some file systems have
        # no locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files; artifacts should get the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def write_private(path: Path, text: str) -> None:
    """Write a text file that only its owner can read, in a folder that is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(handle, 0o600)  # it may have existed
        file.write(text)


def remove_partial_files(folder: str | Path) -> None:
    """Delete the temporary files that killed writers left in a folder.

    Files of running writers, on any machine, are locked and stay. On a file system without locks
    nothing is deleted.
    """
    for path in Path(folder).glob(f".*{PARTIAL_SUFFIX}"):
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def file_lock(path: Path, *, timeout: float = 120.0) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (flock, so that it is freed if the process dies).

    Raises FileLockError after `timeout` seconds, and if the file cannot be written or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise FileLockError(f"cannot lock {path}: {error}") from error
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise FileLockError(
                        f"could not lock {path} within {timeout:.0f} s: another process holds it."
                    ) from None
                time.sleep(0.02)
            except OSError as error:  # some file systems have no locks
                raise FileLockError(f"cannot lock {path}: {error}") from error
        yield
    finally:
        os.close(handle)
