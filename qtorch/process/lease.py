"""Leases: a process shows that it is alive, and others take over its work once it is dead.

A `RenewalThread` renews a lease while its holder works: a claim file (below), a task of a pool
(`qtorch.task.manager`) or a trial of a study (`qtorch.study.search`). A `ProcessIdentity` tells
at once whether a process of this machine still runs, even if its process ID was reused.

`hold_claim` makes sure that only one process at a time works on a job or a run. The holder touches
the claim file while it works. Whether the holder is still alive is known from its identity on its
own machine. If it is on another machine, or suspended, it is judged by the time of the last touch,
so a process that wants the job watches the file for up to `STALE_SECONDS`. The machines must share
the file's folder.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from qtorch.core.errors import FileLockError, QtorchError
from qtorch.core.files import atomic_write, file_lock

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5  # between two checks of a claim that is held on another machine
LOST_CLAIM_EXIT_CODE = 96  # of a process whose job was taken over by another process

ClaimState = tuple[dict[str, Any], int]  # the holder's token, and the time of the last touch in ns


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of some machine.

    machine: host, boot and container; processes with the same text share one space of process IDs.
    start: clock ticks between the machine's boot and the start of the process.
    """

    machine: str
    pid: int
    start: str | None

    @classmethod
    def current(cls) -> Self:
        """Return the identity of this process."""
        return cls(machine_id(), os.getpid(), _start_ticks(os.getpid()))

    def is_alive(self) -> bool | None:
        """Whether the process is running; None if it is on another machine or suspended."""
        if self.machine != machine_id():
            return None
        if self.start is None or _start_ticks(self.pid) != self.start:
            return False
        return None if _is_suspended(self.pid) else True


def machine_id() -> str:
    """Return host, boot ID and process ID namespace (of a container) as one text."""
    parts = [socket.gethostname(), *filter(None, [boot_id()])]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def boot_id() -> str:
    """Return a text that changes when the machine is started again; empty if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """Return when a process started; None if there is no such process, or only a zombie.

    In ticks since boot, because psutil's `create_time` changes whenever the clock is set, and a
    live process must not be taken for a dead one.
    """
    import psutil  # not at the top: the supervisor of a pool's workers stays small

    try:
        boot_time = psutil.boot_time()  # first: psutil below 7 caches it for `create_time`
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return str(round((process.create_time() - boot_time) * os.sysconf("SC_CLK_TCK")))
    except psutil.NoSuchProcess:
        return None


def _is_suspended(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or Ctrl-Z or by a debugger."""
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


class RenewalThread:
    """Context manager in which a thread calls `renew` every `interval` seconds.

    The thread ends when `renew` returns False. If it raises an exception, the next call tries
    again, and the error is logged, once while it stays the same.
    `qtorch.task.manager.LeaseRenewer` overrides `join_seconds` and `_pause_seconds`.
    """

    join_seconds: float | None = None  # how long `stop` waits for a call of `renew` to return

    def __init__(self, renew: Callable[[], bool], interval: float, name: str) -> None:
        self._renew, self._interval, self._name = renew, interval, name
        self._wake_event, self._stop_event = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop_event.is_set()

    def wake(self) -> None:
        """Renew now, without waiting for the end of the interval."""
        self._wake_event.set()

    def stop(self) -> None:
        """Stop renewing."""
        self._stop_event.set()
        self._wake_event.set()
        if self._thread is not threading.current_thread():
            self._thread.join(self.join_seconds)

    def _loop(self) -> None:
        last_error = None
        while True:
            self._wake_event.wait(self._pause_seconds())
            self._wake_event.clear()
            if self.is_stopping:
                return
            try:
                if not self._renew():
                    return
                last_error = None
            except Exception as error:
                is_expected = isinstance(error, QtorchError | OSError)
                if str(error) != last_error:
                    log.warning("could not renew the %s: %s", self._name, error,
                                exc_info=not is_expected)  # fmt: skip
                last_error = str(error)

    def _pause_seconds(self) -> float:
        return self._interval


@contextmanager
def hold_claim(path: Path) -> Iterator[bool]:
    """Hold a claim inside the block; yield False if another live process holds it.

    If the holder is on another machine or suspended, the claim file is watched: for seconds if the
    holder touches it, else for `STALE_SECONDS`. A holder that was suspended for so long that
    another process took over its job exits as soon as it notices, because two processes must not
    write into one run.
    """
    identity = ProcessIdentity.current()
    token = {
        "token": uuid.uuid4().hex,
        "machine": identity.machine,
        "process": [identity.pid, identity.start],
    }
    if not (_take_claim(path, token) or _take_stale_claim(path, token)):
        yield False
        return
    renew = _ClaimRenewal(path, token)
    try:
        with RenewalThread(renew, HEARTBEAT_SECONDS, f"claim {path}"):
            yield True
    finally:
        try:
            with file_lock(_lock_path(path)):  # nobody may take the claim over in between
                if _read_token(path) == token:
                    path.unlink(missing_ok=True)
        except FileLockError as error:  # the work is done; the claim ends with this process
            log.warning("could not release the claim: %s", error)


def is_held(path: Path) -> bool:
    """Whether a live process holds the claim."""
    state = _read_state(path)
    return state is not None and _has_live_holder(path, state)


def is_abandoned(path: Path) -> bool:
    """Whether the holder is gone without having released the claim; False without a claim.

    On another machine it counts as gone `STALE_SECONDS` after its last touch.
    """
    state = _read_state(path)
    return state is not None and not _has_live_holder(path, state)


def has_dead_holder(path: Path) -> bool:
    """Whether the holder was a process of this machine that has ended; False if unknown."""
    token = _read_token(path)
    return token is not None and _holder(token).is_alive() is False


def _has_live_holder(path: Path, state: ClaimState) -> bool:
    is_alive = _holder(state[0]).is_alive()
    return _seconds_since_touch(path, state) < STALE_SECONDS if is_alive is None else is_alive


def describe_holder(path: Path) -> str:
    """Name the holder of a claim: its process ID and host, and since when it holds the claim."""
    token = _read_token(path)
    if token is None:  # released in the meantime
        return "another process"
    holder = _holder(token)
    text = f"process {holder.pid} on {holder.machine.partition(' ')[0]}"
    if "since" not in token:  # an older qtorch has written it
        return text
    start_time = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(token["since"]))
    return f"{text} (since {start_time})"


def _take_claim(path: Path, token: dict[str, Any], stale_state: ClaimState | None = None) -> bool:
    """Take a claim that nobody holds, or whose state is still `stale_state`."""
    with file_lock(_lock_path(path)):
        is_stale = stale_state is not None and _read_state(path) == stale_state
        is_free = is_stale or not is_held(path)
        if is_free:
            token["since"] = time.time()
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(token))
        return is_free


def _take_stale_claim(path: Path, token: dict[str, Any]) -> bool:
    """Take a claim that may be stale if it is not touched while we watch it.

    When a node dies, its job is retried within seconds, while the claim still looks alive. Only
    our own clock measures the wait, and the lock is not held meanwhile.
    """
    last_state = _read_state(path)
    if last_state is None:
        return _take_claim(path, token)
    if _holder(last_state[0]).is_alive() is not None:  # known, so there is nothing to watch
        return _take_claim(path, token)
    # The age may be negative, because the machines' clocks differ.
    max_wait = min(STALE_SECONDS, STALE_SECONDS - _seconds_since_touch(path, last_state))
    log.info(
        "claimed by %s: waiting up to %.0f s to see whether it is still alive",
        describe_holder(path),
        max_wait,
    )
    deadline = time.monotonic() + max_wait
    while (remaining := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_SECONDS, remaining))
        state = _read_state(path)
        if state is None:
            break
        if state != last_state:
            return False
    return _take_claim(path, token, last_state)


class _ClaimRenewal:
    """Touches a claim when it is called; exits the process if another one has taken the claim."""

    def __init__(self, path: Path, token: dict[str, Any]) -> None:
        self.path, self.token = path, token
        self.last_touch = time.monotonic()

    def __call__(self) -> bool:
        current = _read_token(self.path)
        # During a long suspension another process may have taken over the job and finished it.
        was_suspended = time.monotonic() - self.last_touch > STALE_SECONDS
        if current == self.token:
            os.utime(self.path)
        elif current is not None or was_suspended or not _take_claim(self.path, self.token):
            log.critical("another process has taken over this job; exiting.")
            os._exit(LOST_CLAIM_EXIT_CODE)
        self.last_touch = time.monotonic()
        return True


def _lock_path(path: Path) -> Path:
    """Return one of 256 lock files, so that a folder of many claims does not fill with locks."""
    return path.with_name(f".{sha256(path.name.encode()).hexdigest()[:2]}.lock")


def _read_token(path: Path) -> dict[str, Any] | None:
    state = _read_state(path)
    return None if state is None else state[0]


def _holder(token: dict[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(str(token["machine"]), *token["process"])


def _read_state(path: Path) -> ClaimState | None:
    """Return the claim's token and the time of its last touch; None without a readable claim.

    The file is opened before `fstat`, because a network file system refreshes a file's attributes
    when it is opened, while `stat` may return cached ones.
    """
    try:
        with path.open() as file:
            token = json.load(file)
            _holder(token)
            return token, os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _seconds_since_touch(path: Path, state: ClaimState) -> float:
    """Return the seconds since a touch by the clock of the file system, which set its time too."""
    touch_time = state[1] / 1e9
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - touch_time
    except OSError:
        return time.time() - touch_time
    finally:
        probe.unlink(missing_ok=True)
