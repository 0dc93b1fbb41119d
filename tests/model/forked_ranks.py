"""Ranks, and whole trainings, as real processes that need no imports: forked from this one.

What they train may be told to die, or to write down what it has used.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.data.shares import SharedLoader, share_of
from qtorch.model import ranks
from qtorch.model.rank import serve
from qtorch.model.rank_link import RankLink
from qtorch.model.rank_process import RankProcess
from qtorch.model.rank_training import train_rank

assert train_rank  # imported here, so that no rank has to

DDP = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "enable_progress_bar": False}
# "RANK:EPOCH:STEP:HOW", HOW of kill, raise, kill-all, stop.
FATE, DIARY = "TOY_FATE", "TOY_DIARY"
PIDS = "pids"  # a file beside the checkpoints: every rank that was started
_others: set[int] = set()  # the parent's ends of pipes to ranks, which no other rank may hold


class Forked:
    """A process that does `work` and ends."""

    def __init__(self, work: Callable[[], int | None]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                code = work() or 0
            finally:
                os._exit(code)

    def exit_code(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def join(self, seconds: float = 120.0) -> int | None:
        end = time.monotonic() + seconds
        while self.exit_code() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self._code

    def kill(self) -> None:
        if self.exit_code() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.join()


class ForkedRank(RankProcess):
    """A RankProcess without a program of its own."""

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
        self.rank, self._rest = rank, b""
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        os.set_blocking(self._replies, False)
        _others.update((self._commands, self._replies))
        parent, argv = os.getpid(), [str(folder), digest, str(rank), str(local_rank)]

        def work() -> int:
            for fd in _others:
                os.close(fd)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            link = RankLink(replies, commands)
            link.listen()
            _foretell(rank, parent)
            return serve(link, argv)

        self._forked = Forked(work)
        os.close(commands)
        os.close(replies)
        if Path(folder).parent.name == "checkpoints":
            with (Path(folder).parents[1] / PIDS).open("a") as pids:
                pids.write(f"{self.pid}\n")

    @property
    def pid(self) -> int:
        return self._forked.pid

    def exit_code(self) -> int | None:
        return self._forked.exit_code()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._commands, b"stop\n")

    def kill(self) -> None:
        self._forked.kill()
        for fd in {self._commands, self._replies} & _others:
            os.close(fd)
            _others.discard(fd)


def _foretell(rank: int, parent: int) -> None:
    """This rank's fate, before a batch of its training; its diary of the rows it has used."""
    fate, diary = os.environ.get(FATE), os.environ.get(DIARY)
    whole = SharedLoader.batches

    def batches(self: SharedLoader, epoch: int, start_step: int = 0) -> Any:
        for step, batch in enumerate(whole(self, epoch, start_step), start_step):
            who, *at, how = (fate or "-1:0:0:none").split(":")
            if [str(rank), str(epoch), str(step)] == [who, *at]:
                if how == "kill-all":
                    os.kill(parent, signal.SIGKILL)
                if how.startswith("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "stop":
                    os.kill(parent, signal.SIGINT)
                    time.sleep(0.3)
                if how == "raise":
                    raise ZeroDivisionError("a rank divides by zero")
            if diary is not None:
                order = self.order_of(epoch)[step * self.size : (step + 1) * self.size]
                rows = order[share_of(len(order), self.rank, self.world)].tolist()
                with open(diary, "a") as file:
                    file.write(json.dumps([epoch, step, rows]) + "\n")
            yield batch

    SharedLoader.batches = batches  # type: ignore[method-assign]


def is_running(pid: int) -> bool:
    """Whether there is this process, and it has not ended unnoticed."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def training_in(folder: Path, changes: dict[str, Any], **told: str) -> Forked:
    """The toy training on several devices, in a process that may be killed."""

    def work() -> None:
        os.environ.update(told)
        ranks.RankProcess = ForkedRank  # type: ignore[misc]
        resumable_model(**changes).fit(ToyDataset(), recorder=ToyRecorder(folder))

    folder.mkdir(exist_ok=True)
    return Forked(work)
