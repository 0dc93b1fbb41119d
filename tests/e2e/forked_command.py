"""Start qtorch commands as real processes without import time, by forking the test process."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import torch
from forked_process import ForkedProcess, fork_servers_in_place

from qtorch.cli.compose import compose_settings
from qtorch.cli.main import main


@cache
def prepare_commands() -> None:
    """Compose a configuration, so that all commands find Hydra's plugins and parsers ready."""
    compose_settings("train", ["debug=tiny"])


class ForkedCommand(ForkedProcess):
    """A process that runs `qtorch ARGV` in a folder, with `environment` added, and writes to files.

    Its fork server is forked from it too.
    """

    def __init__(
        self, argv: Sequence[str], folder: Path, environment: dict[str, str], new_session: bool
    ) -> None:
        prepare_commands()
        self.args = list(argv)
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        super().__init__(lambda: self._work(folder, environment), new_session=new_session)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the command and return its output and errors."""
        self.wait(timeout)
        out, err = (_read_all(file) for file in self._outputs)
        return out, err

    def _work(self, folder: Path, environment: dict[str, str]) -> int:
        for standard, file in enumerate(self._outputs, 1):
            os.dup2(file.fileno(), standard)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.update({"OMP_NUM_THREADS": "1", **environment})
        sys.argv = ["qtorch", *self.args]
        tempfile.tempdir = None  # TMPDIR of `environment` counts
        path = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [str(folder), *filter(None, path)]
        torch.set_num_threads(1)
        fork_servers_in_place()
        try:
            return int(main(self.args) or 0)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()


def _read_all(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
