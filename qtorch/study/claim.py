"""One process at a time on one job: a claim is a file that its holder touches while it works.

A holder that is gone is known at once on its own machine, by its process, and elsewhere by the age
of its last touch: who wants its job looks for as long as a touch counts. The file lies beside a
local tracking store, else in the user's cache folder, which the nodes of a cluster share with the
home folder (as the checkpoints do).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from qtorch.core.files import cache_folder, whole_file
from qtorch.tracking.locations import file_lock, resolve_uri, sqlite_path

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
LOOK_SECONDS = 0.5  # between two looks at a claim of another machine
LOST = 96  # the exit code of a process whose job another one has taken

Touch = tuple[dict[str, Any], int]  # a holder's token, and the time of its touch


def claims_folder(tracking_uri: str) -> Path:
    """Where the claims on jobs of a tracking store lie."""
    uri = resolve_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None:
        return path.parent / "claims"
    return cache_folder() / "claims" / sha256(uri.encode()).hexdigest()[:16]


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a claim inside the block; False where another process that lives holds it.

    Whether one on another machine lives is looked for: for seconds where it does, for
    `STALE_SECONDS` where it does not. A holder that was stopped for so long (a suspended machine)
    that another has taken its job ends at once when it finds out: two must not write into one run.
    """
    token = {"token": uuid.uuid4().hex, "machine": _machine(), "process": _process(os.getpid())}
    if not (_taken(path, token) or _outlived(path, token)):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_keep, args=(path, token, done), daemon=True, name="claim")
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        if _read(path) == token:
            path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a process that lives holds the claim."""
    touch = _touch(path)
    if touch is None:
        return False
    held = touch[0]
    if held["machine"] == _machine():
        # One with the id of a dead holder has begun at another time.
        return bool(_process(int(held["process"][0])) == held["process"])
    return _age(path, touch) < STALE_SECONDS


def _taken(path: Path, token: dict[str, Any], dead: Touch | None = None) -> bool:
    """Take a claim that nobody holds, or whose last touch is `dead`."""
    with file_lock(path.with_name(f".{path.name}.lock")):
        if is_held(path) and (dead is None or _touch(path) != dead):
            return False
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(token))
        return True


def _outlived(path: Path, token: dict[str, Any]) -> bool:
    """Take the claim of a holder on another machine that does not touch it while we look.

    Where a node dies its job is tried again within seconds, when the claim still looks as that of
    one who lives. Nobody's clock but ours counts while we wait, and the lock is free.
    """
    last = _touch(path)
    if last is None:
        return _taken(path, token)
    holder = str(last[0]["machine"])
    if holder == _machine():
        return False
    patience = min(STALE_SECONDS, STALE_SECONDS - _age(path, last))
    log.info(
        "%s has claimed this job: looking for up to %.0f s whether it still works on it",
        holder.partition(" ")[0],
        patience,
    )
    end = time.monotonic() + patience
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(LOOK_SECONDS, left))
        now = _touch(path)
        if now is None:
            break
        if now != last:
            return False
    return _taken(path, token, last)


def _keep(path: Path, token: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        held = _read(path)
        if held is not None and held != token:
            log.critical("another process has taken this job meanwhile; ending here.")
            os._exit(LOST)
        try:
            if held is None:
                _taken(path, token)
            else:
                os.utime(path)
        except OSError as error:
            log.warning("the claim %s cannot be renewed: %s", path, error)


def _read(path: Path) -> dict[str, Any] | None:
    touch = _touch(path)
    return None if touch is None else touch[0]


def _touch(path: Path) -> Touch | None:
    """Who holds the claim, and when it was touched last; None where there is none to be read.

    A network file system tells news of a file to who opens it; `stat` may be told old ones.
    """
    try:
        with path.open() as file:
            return json.load(file), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError):
        return None


def _age(path: Path, touch: Touch) -> float:
    """Seconds since that touch, by the clock that made it: the file system's."""
    touched = touch[1] / 1e9
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - touched
    except OSError:
        return time.time() - touched
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """What shares process ids with this process: host, boot, container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(pid: int) -> list[Any] | None:
    """A process's id and when it began; None where there is none (or only its remains)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return [pid, ""]
    return None if fields[0] in "ZX" else [pid, fields[19]]
