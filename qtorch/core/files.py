"""Files that are written whole or not at all, and where cached ones lie."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".part"


def cache_folder() -> Path:
    """QTORCH_CACHE, else `qtorch` under XDG_CACHE_HOME or `~/.cache`."""
    given = os.environ.get("QTORCH_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qtorch"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes `path`'s place when the block ends well.

    The content reaches the disk before the rename, so that a crash leaves the old file or the new
    one. On an error the temporary file goes away and the error passes; what a killed process left
    is found by `remove_unfinished`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(UNFINISHED, f".{target.name}.", target.parent)
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer lives
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; a run's artifacts are readable as usual.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files that writers of this folder left when they were killed.

    Those of living writers stay, on any machine; on a file system without locks all do.
    """
    for path in Path(folder).glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
