"""One process at a time on one job: a claim is a file that its holder touches while it works.

A holder that is gone is known at once on its own machine, by its process, and elsewhere by the age
of its last touch. The file lies beside a local tracking store, else in the user's cache folder,
which the nodes of a cluster share with the home folder (as the checkpoints do).
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
LOST = 96  # the exit code of a process whose job another one has taken


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

    A holder that was stopped for so long (a suspended machine) that another has taken its job
    ends at once when it finds out: two must not write into one run.
    """
    token = {"token": uuid.uuid4().hex, "machine": _machine(), "process": _process(os.getpid())}
    if not _taken(path, token):
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
    held = _read(path)
    if held is None:
        return False
    if held["machine"] == _machine():
        # One with the id of a dead holder has begun at another time.
        return bool(_process(int(held["process"][0])) == held["process"])
    return _age(path) < STALE_SECONDS


def _taken(path: Path, token: dict[str, Any]) -> bool:
    with file_lock(path.with_name(f".{path.name}.lock")):
        if is_held(path):
            return False
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(token))
        return True


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
    try:
        held: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return held


def _age(path: Path) -> float:
    """Seconds since the last touch, by the clock that made it: the file system's."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return STALE_SECONDS
    except OSError:
        return time.time() - path.stat().st_mtime
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
