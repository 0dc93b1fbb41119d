"""Work for forked children, named by tests/task/test_forked.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


def describe(request, tell):
    """What the child is."""
    import torch

    tell(
        {
            "given": request,
            "folder": os.getcwd(),
            "variable": os.environ.get("FORK_TEST"),
            "argv": sys.argv,
            "threads": torch.get_num_threads(),
            "group": os.getpgrp() == os.getpid(),
        }
    )
    print("said by the child", flush=True)
    return 3


def remember(request, tell):
    """Something that a later child must not see."""
    import torch

    tell({"before": getattr(torch, "fork_test", None)})
    torch.fork_test = request["value"]


def name_backend(request, tell):
    """How matplotlib draws here."""
    import matplotlib

    tell({"backend": matplotlib.get_backend().lower()})


def leave(request, tell):
    """A file that says that the work was begun."""
    with open(request["path"], "w"):
        pass


def die(request, tell):
    """As the kernel ends a process that wants too much memory."""
    tell({"run": "begun"})
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_stop(request, tell):
    """Count the interruptions that reach the work."""
    tell({"waiting": os.getpid()})
    count, end = 0, time.monotonic() + 10
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            count, end = count + 1, time.monotonic() + 0.5
    tell({"stops": count, "thread": threading.current_thread() is threading.main_thread()})
