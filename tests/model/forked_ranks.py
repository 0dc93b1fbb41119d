"""Ranks, and whole trainings, as real processes that need no imports: forked from a server that has
made them. What they train may be told to die, or to write down what it has used."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.model.rank_process import RankProcess

SERVER = multiprocessing.get_context("forkserver")
DDP = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "enable_progress_bar": False}
# "RANK:EPOCH:STEP:HOW", HOW of kill, raise, kill-all, stop, or a pause in seconds.
FATE, DIARY = "TOY_FATE", "TOY_DIARY"


def ready() -> None:
    """Have the server make its imports."""
    SERVER.set_forkserver_preload(
        ["toy_training", "forked_ranks", "qtorch.model.rank_training", "qtorch.model.ranks"]
    )
    process = SERVER.Process(target=os.getpid)
    process.start()
    process.join()


class ForkedRank(RankProcess):
    """A RankProcess whose process is forked from the server."""

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
        commands, self._commands = SERVER.Pipe(duplex=False)
        replies, write = SERVER.Pipe(duplex=False)
        self._replies = os.dup(replies.fileno())
        replies.close()
        os.set_blocking(self._replies, False)
        told = {k: os.environ[k] for k in (FATE, DIARY) if k in os.environ}
        arguments = ([str(folder), digest, str(rank), str(local_rank)], commands, write)
        self._forked = SERVER.Process(target=_rank, args=(*arguments, told, os.getpid()))
        self._forked.start()
        commands.close()
        write.close()
        self._stdin = os.fdopen(os.dup(self._commands.fileno()), "wb")
        self._commands.close()

    @property
    def pid(self) -> int:
        assert self._forked.pid is not None
        return self._forked.pid

    def exit_code(self) -> int | None:
        return self._forked.exitcode

    def stop(self) -> None:
        self._stdin.write(b"stop\n")
        self._stdin.flush()

    def kill(self) -> None:
        if self._forked.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
        self._forked.join()
        self._stdin.close()
        if self._replies >= 0:
            os.close(self._replies)
            self._replies = -1


def _rank(argv: list[str], commands: Any, write: Any, told: dict[str, str], parent: int) -> None:
    import torch

    from qtorch.model.rank import serve
    from qtorch.model.rank_link import RankLink

    os.setsid()
    os.environ.update(told)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    _foretell(int(argv[2]), parent)
    link = RankLink(os.dup(write.fileno()), os.dup(commands.fileno()))
    commands.close()
    write.close()
    link.listen()
    os._exit(serve(link, argv))


def _foretell(rank: int, parent: int) -> None:
    """This rank's fate, before a batch of its training; its diary of the rows it has used."""
    import time

    from qtorch.data.shares import SharedLoader, share_of

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


def train_in(folder: str, told: dict[str, str], changes: dict[str, Any]) -> None:
    """The toy training on two devices, in a process that may be killed."""
    import torch

    import qtorch.model.ranks

    os.environ.update(told)
    torch.set_num_threads(1)
    qtorch.model.ranks.RankProcess = ForkedRank  # type: ignore[misc]
    model = resumable_model(**changes)
    model.fit(ToyDataset(), recorder=ToyRecorder(Path(folder)))
