"""Ranks and whole trainings as forked processes, which need no slow imports.

Environment variables make a rank fail at a certain batch, or write down the rows that it used.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from forked_process import ForkedProcess, fork_servers_in_place, start_servers_as_usual
from toy_training import ToyDataset, ToyRecorder, resumable_model

from qtorch.data.dataset.batches import ShardedLoader, shard_slice
from qtorch.model.devices import ranks
from qtorch.model.devices.rank_process import start_rank
from qtorch.process.child import Child

DDP = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "enable_progress_bar": False}
# "RANK:EPOCH:STEP:ACTION", with the action kill, raise, kill-all or stop.
FAULT_VARIABLE, ROW_LOG_VARIABLE = "TOY_FAULT", "TOY_ROW_LOG"
PIDS_FILE = "pids"  # a file with the process ID of every rank that was started


def fork_ranks_in_place(started: list[Child] | None = None) -> None:
    """Fork the ranks of this process from it, and let the environment make them fail.

    Appends them to `started`, and their process IDs to the file PIDS_FILE of their training.
    """
    parent = os.getpid()
    fork_servers_in_place(lambda: _inject_faults(parent))

    def start(*arguments: Any, folder: Path, **options: Any) -> Child:
        child = start_rank(*arguments, folder=folder, **options)
        while child.pid is None:
            child._read_status()
        if started is not None:
            started.append(child)
        if Path(folder).parent.name == "checkpoints":
            with (Path(folder).parents[1] / PIDS_FILE).open("a") as pids:
                pids.write(f"{child.pid}\n")
        return child

    ranks.start_rank = start


def start_ranks_as_usual() -> None:
    """Undo `fork_ranks_in_place`."""
    start_servers_as_usual()
    ranks.start_rank = start_rank


def _inject_faults(parent: int) -> None:
    """Make a rank fail before a batch of its training, and write down the rows that it used."""
    original_batches = ShardedLoader.batches

    def batches(self: ShardedLoader, epoch: int, start_step: int = 0) -> Any:
        fault, row_log = os.environ.get(FAULT_VARIABLE), os.environ.get(ROW_LOG_VARIABLE)
        rank = os.environ["RANK"]
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            fault_rank, *fault_step, action = (fault or "-1:0:0:none").split(":")
            if [rank, str(epoch), str(step)] == [fault_rank, *fault_step]:
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
        fork_ranks_in_place()
        resumable_model(**changes).fit(ToyDataset(), recorder=ToyRecorder(folder))

    folder.mkdir(exist_ok=True)
    return ForkedProcess(work, new_session=True)
