"""Which process runs a trial, and whether it is still there."""

from __future__ import annotations

import os
import socket
from typing import Any


def this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start(os.getpid())}


def is_dead(process: Any) -> bool:
    """Whether a process of this machine has ended; False for one elsewhere."""
    if not process or process["host"] != socket.gethostname():
        return False
    return bool(_start(process["pid"]) != process["start"])


def _start(pid: int) -> str | None:
    """When a process began, as Linux counts it, so that a number used again is told apart;
    elsewhere only whether it is there."""
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
