"""A rank on this machine, as its parent process handles it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

import qtorch
from qtorch.model.devices.rank_link import STOP

# Variables that another launcher sets for its own processes; ranks must not inherit them.
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE")


class RankHandle(Protocol):
    """A rank process, local or remote."""

    rank: int

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages received since the last call."""

    def exit_code(self) -> int | None:
        """Return the exit code (negative for a signal), or None while the rank runs."""

    def stop(self) -> None:
        """Ask the rank to stop after its current step."""

    def kill(self) -> None:
        """Kill the rank and its children immediately."""


class RankProcess:
    """A rank in a child process with its own process group; it exits when this process does."""

    def __init__(
        self,
        rank: int,
        local_rank: int,
        size: int,
        *,
        threads: int,
        folder: Path,
        digest: str,
        local: bool,
    ) -> None:
        self.rank = rank
        self._buffer = b""
        self._replies, write = os.pipe()
        os.set_blocking(self._replies, False)
        try:
            command = [
                "-m",
                "qtorch.model.devices.rank",
                str(folder),
                digest,
                str(rank),
                str(local_rank),
            ]
            self._process = subprocess.Popen(
                [sys.executable, *command, str(write)],
                stdin=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,
                env=build_rank_variables(rank, local_rank, size, threads, local),
            )
        finally:
            os.close(write)

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages received since the last call."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._replies, 65536):
                self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def exit_code(self) -> int | None:
        """Return the exit code (negative for a signal), or None while the rank runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask the rank to stop after its current step."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(STOP + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """Kill the rank and its children immediately."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1


def build_rank_variables(
    rank: int, local_rank: int, size: int, threads: int, local: bool
) -> dict[str, str]:
    """Return the environment variables of a rank; `local`: all ranks are on this machine."""
    parent_variables = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    rank_variables = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": size,
        "OMP_NUM_THREADS": threads,
    }
    variables = {**parent_variables, **{k: str(v) for k, v in rank_variables.items()}}
    # The rank must import this very qtorch; its request restores the rest of sys.path.
    package_parent = str(Path(qtorch.__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(
        p for p in (package_parent, parent_variables.get("PYTHONPATH")) if p
    )
    variables["MPLBACKEND"] = "Agg"  # a notebook's backend cannot be imported here
    if local and sys.platform == "linux":
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name may not resolve
    return variables


def threads_per_rank(num_local: int) -> int:
    """Return the threads of each of several ranks on this machine: an equal part, at least one."""
    return max(1, torch.get_num_threads() // num_local)
