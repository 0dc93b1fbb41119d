"""Identity of the process that runs a trial, and whether that process has ended."""

from __future__ import annotations

import os
import socket
from typing import Any


def process_identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid())}


def has_ended(process: Any) -> bool:
    """Whether a process of this machine has ended; False for a process on another machine."""
    if not process or process["host"] != socket.gethostname():
        return False
    return bool(_start_time(process["pid"]) != process["start"])


def _start_time(pid: int) -> str | None:
    """Return a process's start time in Linux clock ticks, None if it has ended.

    The start time reveals that a process ID was reused. On other systems the result only says
    whether the process exists."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "there" if not os.path.isdir("/proc/self") else None
