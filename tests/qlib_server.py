"""Programs for the Python with real Qlib, in forked processes that find its libraries imported.

    python qlib_server.py serve SOCKET OWNER QLIB_PYTHON
    python qlib_server.py run SOCKET OWNER QLIB_PYTHON [-c CODE | -m MODULE | FILE] [ARGUMENT ...]

`run` does what `QLIB_PYTHON ARGUMENT ...` would do, in a forked process that has its streams,
working folder and environment, and that is killed when it ends. Qlib itself is imported by each of
these processes, since it reads the working folder then. The first `run` starts the server, which
ends with the process OWNER.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# What Qlib imports, and its models.
LIBRARIES = (
    "pandas",
    "torch",
    "mlflow",
    "scipy.stats",
    "sklearn.linear_model",
    "lightgbm",
    "catboost",
    "cvxpy",
    "matplotlib.pyplot",
    "joblib",
    "pymongo",
    "redis",
    "ruamel.yaml",
    "tqdm.auto",
)
POLL_SECONDS = 0.02
START_SECONDS = 120


def write_launcher(folder: Path, qlib_python: str) -> Path:
    """Write a program that takes the place of Qlib's Python for this process and its children."""
    launcher = folder / "python"
    options = [folder / "socket", os.getpid(), qlib_python]
    command = [sys.executable, "-S", "-E", __file__, "run", *options]
    launcher.write_text(f'#!/bin/sh\nexec {" ".join(map(str, command))} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def run(path: str, owner: str, qlib_python: str, *arguments: str) -> int:
    """Run a program by the server, which is started if there is none, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        with open(path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(path):
                start_server(path, owner, qlib_python)
            connection.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        answer = connection.makefile().readline()
    return int(answer) if answer else 1


def start_server(path: str, owner: str, qlib_python: str) -> None:
    command = [qlib_python, __file__, "serve", path, owner, qlib_python]
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + START_SECONDS
    while not os.path.exists(path):
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{' '.join(command)} did not start")
        time.sleep(POLL_SECONDS)


def serve(path: str, owner: str, *_: str) -> None:
    """Answer requests until the owner has ended."""
    for name in LIBRARIES:
        with suppress(ImportError):
            import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    listener.settimeout(1.0)
    while os.path.exists(f"/proc/{owner}"):
        with suppress(TimeoutError):
            connection, _address = listener.accept()
            connection.setblocking(True)
            threading.Thread(target=answer_request, args=(connection,), daemon=True).start()


def answer_request(connection: socket.socket) -> None:
    """Run a program in a forked process, send its exit code; kill it if nobody waits for it."""
    with connection:
        head, descriptors, _flags, _address = socket.recv_fds(connection, 8, 3)
        size, content = int.from_bytes(head, "big"), b""
        while len(content) < size:
            content += connection.recv(size - len(content))
        child = os.fork()
        if child == 0:
            end_as_program(json.loads(content), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                connection.sendall(b"%d\n" % (os.waitstatus_to_exitcode(status) & 0xFF))
                return
            if select.select([connection], [], [], POLL_SECONDS)[0]:  # the other end has closed it
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return


def end_as_program(request: dict[str, Any], descriptors: list[int]) -> None:
    """Run the requested program in this process, and end it."""
    code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, closefd=False)  # noqa: SIM115  # they live as long as the process
            for number, mode in enumerate("rww")
        )
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        code = exit_code(request["arguments"])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def exit_code(arguments: list[str]) -> int:
    """Run a program as Python does and return its exit code; print an exception's traceback."""
    kind, *rest = arguments
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, "")
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            sys.path.insert(0, os.getcwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(kind).resolve().parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    command, *options = sys.argv[1:]
    sys.exit(serve(*options) if command == "serve" else run(*options))
