"""Run Python programs in forked processes that find torch, the pretended GPU and qtorch imported.

    python program_server.py

reads a request per line, `{"arguments": [program, ...], "output": FILE, "errors": FILE}`, and
writes the exit code of the program as a line.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence

import pretended_cuda  # noqa: F401  # before torch

# isort: split
import small_networks  # noqa: F401

import qtorch.trainer.preload  # noqa: F401

TIMEOUT = 1800  # seconds


def run_program(arguments: Sequence[str]) -> None:
    """Run a file, or after `-m` a module, as Python does."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def exit_code(arguments: Sequence[str]) -> int:
    """Run a program and return its exit code; print the traceback of an exception."""
    try:
        run_program(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork_program(arguments: Sequence[str], output: str, errors: str) -> int:
    """Run a program in a forked process, whose output goes to the files; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for number, path in enumerate((output, errors), 1):
            with open(path, "wb") as file:
                os.dup2(file.fileno(), number)
        signal.alarm(TIMEOUT)
        code = exit_code(arguments)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def main() -> None:
    gc.freeze()  # garbage collections of the programs would look through all modules
    for line in sys.stdin:
        print(fork_program(**json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
