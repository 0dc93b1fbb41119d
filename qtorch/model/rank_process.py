"""A rank of this machine, as its parent holds it."""

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
from qtorch.model.rank_link import STOP

# What another launcher says of its own processes is nothing for ours.
LAUNCHERS = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE")


class RankHandle(Protocol):
    """A rank, wherever it runs."""

    rank: int

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since the last question."""

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Ask it to stop after its step."""

    def kill(self) -> None:
        """End it, and what it has started, now."""


class RankProcess:
    """A rank in a process of its own, leader of its own group; it ends when this one does."""

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
        self._rest = b""
        self._replies, write = os.pipe()
        os.set_blocking(self._replies, False)
        try:
            command = ["-m", "qtorch.model.rank", str(folder), digest, str(rank), str(local_rank)]
            self._process = subprocess.Popen(
                [sys.executable, *command, str(write)],
                stdin=subprocess.PIPE,
                pass_fds=(write,),
                start_new_session=True,
                env=rank_environment(rank, local_rank, size, threads, local),
            )
        finally:
            os.close(write)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since the last question."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._replies, 65536):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to stop after its step."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(STOP + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it, and what it has started, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1


def rank_environment(
    rank: int, local_rank: int, size: int, threads: int, local: bool
) -> dict[str, str]:
    """The variables of a rank's process; `local`: all ranks are on this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    own = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size, "OMP_NUM_THREADS": threads}
    found = {**kept, **{k: str(v) for k, v in own.items()}}
    # The rank is of this very qtorch, and finds the rest where its request says.
    home = str(Path(qtorch.__file__).parents[1])
    found["PYTHONPATH"] = os.pathsep.join(p for p in (home, kept.get("PYTHONPATH")) if p)
    found["MPLBACKEND"] = "Agg"  # a notebook's own backend would want the notebook
    if local and sys.platform == "linux":
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
    return found


def threads_of(num_local: int) -> int:
    """The threads of each of several ranks of this machine: this process's, shared out, at least
    one each."""
    return max(1, torch.get_num_threads() // num_local)
