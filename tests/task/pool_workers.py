"""What the pool's tests run in processes of their own, and how they wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def until(condition: Callable[[], object], seconds: float = 20.0, pause: float = 0.02) -> None:
    """Wait until the condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(pause)


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process that runs `code`, which finds this module and its arguments in sys.argv."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, also one that is stopped, and wait for it."""
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def note(path: str, line: str) -> None:
    """Append a line whole, beside other processes."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def brief(definition: Mapping[str, Any], journal: str, seconds: float = 0.02) -> dict[str, Any]:
    """A short task: says that it runs, sleeps a little, gives its number back."""
    note(journal, f"{definition['number']} {os.getpid()}")
    time.sleep(seconds)
    return {"number": definition["number"], "pid": os.getpid()}
