"""Claims: files that make sure that only one process at a time works on a job.

The holder of a claim touches the claim file while it works. Whether the holder is still alive is
known at once on its own machine, from its process ID; on other machines it is judged by the time
of the last touch, so a process that wants the job watches the file for up to `STALE_SECONDS`.
The file lies beside a local tracking store, else in the user's cache folder, which the nodes of a
cluster share with the home folder (as they share the checkpoints).
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

from qtorch.core.files import atomic_write, cache_folder
from qtorch.tracking.locations import file_lock, resolve_uri, sqlite_path

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5  # between two checks of a claim that is held on another machine
LOST_CLAIM_EXIT_CODE = 96  # of a process whose job was taken over by another process

Touch = tuple[dict[str, Any], int]  # the holder's token, and the modification time of the file


def claims_folder(tracking_uri: str) -> Path:
    """The folder of the claim files for the jobs of a tracking store."""
    uri = resolve_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None:
        return path.parent / "claims"
    return cache_folder() / "claims" / sha256(uri.encode()).hexdigest()[:16]


@contextmanager
def hold_claim(path: Path) -> Iterator[bool]:
    """Hold a claim inside the block; yield False if another live process holds it.

    If the holder is on another machine, the claim file is watched: for seconds if the holder is
    alive, for `STALE_SECONDS` if it is not. A holder that was suspended for so long that another
    process took over its job exits as soon as it notices, because two processes must not write
    into one run.
    """
    token = {
        "token": uuid.uuid4().hex,
        "machine": _machine_id(),
        "process": _process_id(os.getpid()),
    }
    if not (_take_claim(path, token) or _take_stale_claim(path, token)):
        yield False
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_renew_claim, args=(path, token, stop), daemon=True, name="claim"
    )
    thread.start()
    try:
        yield True
    finally:
        stop.set()
        thread.join()
        if _read_token(path) == token:
            path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether a live process holds the claim."""
    touch = _read_touch(path)
    if touch is None:
        return False
    token = touch[0]
    if token["machine"] == _machine_id():
        # Compares the start time as well: the ID of a dead holder may have been reused.
        return bool(_process_id(int(token["process"][0])) == token["process"])
    return _touch_age(path, touch) < STALE_SECONDS


def _take_claim(path: Path, token: dict[str, Any], stale_touch: Touch | None = None) -> bool:
    """Take a claim that nobody holds, or whose last touch is still `stale_touch`."""
    with file_lock(path.with_name(f".{path.name}.lock")):
        if is_held(path) and (stale_touch is None or _read_touch(path) != stale_touch):
            return False
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(token))
        return True


def _take_stale_claim(path: Path, token: dict[str, Any]) -> bool:
    """Take the claim of a holder on another machine if it is not touched while we watch it.

    When a node dies, its job is retried within seconds, while the claim still looks alive. Only
    our own clock measures the wait, and the lock is not held meanwhile.
    """
    last_touch = _read_touch(path)
    if last_touch is None:
        return _take_claim(path, token)
    holder = str(last_touch[0]["machine"])
    if holder == _machine_id():
        return False
    max_wait = min(STALE_SECONDS, STALE_SECONDS - _touch_age(path, last_touch))
    log.info(
        "this job is claimed by %s: waiting up to %.0f s to see whether it is still alive",
        holder.partition(" ")[0],
        max_wait,
    )
    deadline = time.monotonic() + max_wait
    while (remaining := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_SECONDS, remaining))
        touch = _read_touch(path)
        if touch is None:
            break
        if touch != last_touch:
            return False
    return _take_claim(path, token, last_touch)


def _renew_claim(path: Path, token: dict[str, Any], stop: threading.Event) -> None:
    """Touch the claim until `stop` is set; exit the process if another one took the claim."""
    while not stop.wait(HEARTBEAT_SECONDS):
        current = _read_token(path)
        if current is not None and current != token:
            log.critical("another process has taken over this job; exiting.")
            os._exit(LOST_CLAIM_EXIT_CODE)
        try:
            if current is None:
                _take_claim(path, token)
            else:
                os.utime(path)
        except OSError as error:
            log.warning("cannot renew the claim %s: %s", path, error)


def _read_token(path: Path) -> dict[str, Any] | None:
    touch = _read_touch(path)
    return None if touch is None else touch[0]


def _read_touch(path: Path) -> Touch | None:
    """The claim's token and the time of its last touch; None if there is no readable claim.

    The file is opened before `fstat`, because a network file system refreshes a file's attributes
    when it is opened, while `stat` may return cached ones.
    """
    try:
        with path.open() as file:
            return json.load(file), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError):
        return None


def _touch_age(path: Path, touch: Touch) -> float:
    """Seconds since a touch, by the clock of the file system, which also set its time."""
    touch_time = touch[1] / 1e9
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - touch_time
    except OSError:
        return time.time() - touch_time
    finally:
        probe.unlink(missing_ok=True)


def _machine_id() -> str:
    """Host, boot and container: processes with the same text share one space of process IDs."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_id(pid: int) -> list[Any] | None:
    """A process's ID and start time; None if there is no such process, or only a zombie."""
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
