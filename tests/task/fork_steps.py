"""Functions that tests/task/test_forked.py calls in forked children."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


def describe(request, reply):
    """Report the environment of the child."""
    import torch

    reply(
        {
            "request": request,
            "folder": os.getcwd(),
            "variable": os.environ.get("FORK_TEST"),
            "argv": sys.argv,
            "threads": torch.get_num_threads(),
            "group": os.getpgrp() == os.getpid(),
        }
    )
    print("printed by the child", flush=True)
    return 3


def remember(request, reply):
    """Set a value in memory that a later child must not see."""
    import torch

    reply({"before": getattr(torch, "fork_test", None)})
    torch.fork_test = request["value"]


def name_backend(request, reply):
    """Report matplotlib's backend."""
    import matplotlib

    reply({"backend": matplotlib.get_backend().lower()})


def create_file(request, reply):
    """Create a file, which shows that the function was called."""
    with open(request["path"], "w"):
        pass


def die(request, reply):
    """Kill this process, as the kernel does if it uses too much memory."""
    reply({"run": "started"})
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_stop(request, reply):
    """Count the interruptions that reach this function."""
    reply({"waiting": os.getpid()})
    count, end = 0, time.monotonic() + 10
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            count, end = count + 1, time.monotonic() + 0.5
    reply({"stops": count, "thread": threading.current_thread() is threading.main_thread()})
