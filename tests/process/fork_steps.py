"""Functions that tests/process/test_fork_server.py calls in forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


def describe(request, parent):
    """Report the environment of the child."""
    import torch

    parent.send(
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


def describe_memory(request, parent):
    """Report whether garbage is collected, here and in a process forked from here."""
    import gc

    report = {"enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}
    gc.disable()
    if os.fork() == 0:
        parent.send({**report, "enabled below": gc.isenabled()})
        os._exit(0)
    os.wait()


def remember(request, parent):
    """Set a value in memory that a later child must not see."""
    import torch

    parent.send({"before": getattr(torch, "fork_test", None)})
    torch.fork_test = request["value"]


def name_backend(request, parent):
    """Report matplotlib's backend."""
    import matplotlib

    parent.send({"backend": matplotlib.get_backend().lower()})


def create_file(request, parent):
    """Create a file, which shows that the function was called."""
    with open(request["path"], "w"):
        pass


def report_variable(request, parent):
    """Report a variable of the environment."""
    parent.send({"value": os.environ.get(request["name"])})


def send_many(request, parent):
    """Send several messages at once, then create the file `sent`."""
    for number in range(request["count"]):
        parent.send({"number": number})
    Path(request["sent"]).touch()


def ignore_stops(request, parent):
    """Work for a while although this process is stopped."""
    end, is_announced = time.monotonic() + 15, False
    while time.monotonic() < end:
        try:
            if not is_announced:  # the interruption may come at once
                is_announced = True
                parent.send({"pid": os.getpid()})
            time.sleep(0.05)
        except KeyboardInterrupt:
            pass


def die(request, parent):
    """Kill this process, as the kernel does if it uses too much memory."""
    parent.send({"run": "started"})
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_stop(request, parent):
    """Count the interruptions that reach this function."""
    count, end, is_announced = 0, time.monotonic() + 10, False
    while time.monotonic() < end:
        try:
            if not is_announced:  # the interruption may come at once
                is_announced = True
                parent.send({"waiting": os.getpid()})
            time.sleep(0.05)
        except KeyboardInterrupt:
            count, end = count + 1, time.monotonic() + 0.5
    parent.send({"stops": count, "thread": threading.current_thread() is threading.main_thread()})


def start_sleep(request, parent):
    """Start a process and wait."""
    with open(request["path"], "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"]).pid))
    parent.send({"started": True})
    time.sleep(600)


def raise_error(request, parent):
    raise ValueError(request["text"])
