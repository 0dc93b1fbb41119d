"""Ranks and whole trainings as forked processes, which need no slow imports.

Environment variables make a rank fail at a certain batch, or write down the rows that it used.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from forked_process import ForkedProcess
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.data.dataset.batches import ShardedLoader, shard_slice
from qtorch.model.devices import ranks
from qtorch.model.devices.rank import run_rank
from qtorch.model.devices.rank_link import RankLink
from qtorch.model.devices.rank_process import RankProcess
from qtorch.model.devices.rank_training import train_rank

assert train_rank  # import it here, so that no forked rank has to

DDP = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "enable_progress_bar": False}
# "RANK:EPOCH:STEP:ACTION", with the action kill, raise, kill-all or stop.
FAULT_VARIABLE, ROW_LOG_VARIABLE = "TOY_FAULT", "TOY_ROW_LOG"
PIDS_FILE = "pids"  # a file with the process ID of every rank that was started
_parent_fds: set[int] = set()  # the parent's ends of the pipes, which a forked rank must close


class ForkedRank(RankProcess):
    """A RankProcess that is forked instead of started as a new program."""

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
        self.rank, self._buffer = rank, b""
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        os.set_blocking(self._replies, False)
        _parent_fds.update((self._commands, self._replies))
        parent, argv = os.getpid(), [str(folder), digest, str(rank), str(local_rank)]

        def work() -> int:
            for fd in _parent_fds:
                os.close(fd)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            link = RankLink(replies, commands)
            link.listen()
            _inject_faults(rank, parent)
            return run_rank(link, argv)

        self._process = ForkedProcess(work, new_session=True)
        os.close(commands)
        os.close(replies)
        if Path(folder).parent.name == "checkpoints":
            with (Path(folder).parents[1] / PIDS_FILE).open("a") as pids:
                pids.write(f"{self.pid}\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._commands, b"stop\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for fd in {self._commands, self._replies} & _parent_fds:
            os.close(fd)
            _parent_fds.discard(fd)


def _inject_faults(rank: int, parent: int) -> None:
    """Make this rank fail before a batch of its training, and write down the rows that it used."""
    fault, row_log = os.environ.get(FAULT_VARIABLE), os.environ.get(ROW_LOG_VARIABLE)
    original_batches = ShardedLoader.batches

    def batches(self: ShardedLoader, epoch: int, start_step: int = 0) -> Any:
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            fault_rank, *fault_step, action = (fault or "-1:0:0:none").split(":")
            if [str(rank), str(epoch), str(step)] == [fault_rank, *fault_step]:
                if action == "kill-all":
                    os.kill(parent, signal.SIGKILL)
                if action.startswith("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if action == "stop":
                    os.kill(parent, signal.SIGINT)
                    time.sleep(0.3)
                if action == "raise":
                    raise ZeroDivisionError("a rank divides by zero")
            if row_log is not None:
                order = self.epoch_order(epoch)[step * self.size : (step + 1) * self.size]
                rows = order[shard_slice(len(order), self.rank, self.world_size)].tolist()
                with open(row_log, "a") as file:
                    file.write(json.dumps([epoch, step, rows]) + "\n")
            yield batch

    ShardedLoader.batches = batches  # type: ignore[method-assign]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_training(folder: Path, changes: dict[str, Any], **variables: str) -> ForkedProcess:
    """Start the toy training on several devices in a process that may be killed."""

    def work() -> None:
        os.environ.update(variables)
        ranks.RankProcess = ForkedRank  # type: ignore[misc]
        resumable_model(**changes).fit(ToyDataset(), recorder=ToyRecorder(folder))

    folder.mkdir(exist_ok=True)
    return ForkedProcess(work, new_session=True)
