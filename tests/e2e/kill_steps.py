"""Trains one task again and again in processes that kill themselves; run as a script.

    python kill_steps.py FOLDER KILLS DEVICES

Every attempt is a real process (forked from this one, which has done nothing but import) that
ends by SIGKILL at a moment drawn from the stages that a task goes through, until KILLS are done.
A task that came to its end meanwhile is followed by the next one, with another seed. Each of them
is also trained undisturbed. Prints JSON: `{"rounds": [{"whole": id, "killed": id}], "kills":
{stage: count}}`. On two DEVICES it is the parent of the ranks that dies.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.store.artifact.artifact_repository_registry
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch

import qtorch.model.lightning_model
import qtorch.model.rank_training
import qtorch.record.signal_analysis
import qtorch.record.signal_chart
import qtorch.tracking.mlflow_store  # noqa: F401
from qtorch.core import heartbeat
from qtorch.core.session import init
from qtorch.model import ranks
from qtorch.trainer.run import task_train

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))  # for forked_ranks

# The stages to die in, in turns; "" is any. Some come once an epoch, some once a task.
STAGES = ("training", "validation", "", "checkpoint", "training", "saving", "record", "scoring", "")
EXPERIMENTS = ("whole", "killed")


def task(seed: int, devices: int) -> dict[str, Any]:
    """A small training with all that a continuation has to hold, and two records."""
    source = {
        "_target_": "qtorch.data.SyntheticSource",
        "num_instruments": 12,
        "num_sectors": 2,
        "start_time": "2019-01-01",
        "end_time": "2019-12-31",
        "signal": 0.2,
    }
    handler = {
        "_target_": "qtorch.data.Alpha360",
        "source": source,
        "instruments": "stocks",
        "learn_processors": ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {}}],
        "infer_processors": [{"class": "Fillna", "kwargs": {"fields_group": "feature"}}],
    }
    segments = {
        "train": ("2019-01-01", "2019-07-31"),
        "valid": ("2019-08-01", "2019-09-30"),
        "test": ("2019-10-01", "2019-12-20"),
    }
    trainer = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False}
    if devices > 1:
        trainer |= {"devices": devices, "strategy": "ddp"}
    return {
        "model": {
            "_target_": "qtorch.model.LightningModel",
            "network": {"_target_": "qtorch.nn.MLP", "layers": [8], "dropout": 0.3},
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
            "batch": {"size": 100},
            "trainer": trainer,
            "checkpoint": {"every_n_steps": 3},
            "monitor": "rank_ic",
        },
        "dataset": {"_target_": "qtorch.data.DatasetH", "handler": handler, "segments": segments},
        "record": ["SignalRecord", "SigAnaRecord"],
        "seed": seed,
    }


def attempt(
    folder: Path, seed: int, devices: int, which: str, stage: str | None, draw: random.Random
) -> int:
    """One process that trains the task, in the run that an earlier one began; how it ended."""
    note = folder / f"{which}-{seed}.json"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        init(tracking_uri=f"sqlite:///{folder / 'runs.db'}")
        heartbeat.PAUSE_SECONDS = 0.0
        earlier = json.loads(note.read_text()) if note.exists() else None

        own = os.getpid()
        nth, seen, delay = draw.randint(1, 6), 0, draw.choice((0.0, 0.0, draw.random() * 0.03))

        def listen(told: str, details: dict[str, Any]) -> None:
            nonlocal seen
            if os.getpid() != own:  # a rank, forked from here
                return
            if told == heartbeat.RUN:
                temporary = note.with_suffix(".new")
                temporary.write_text(json.dumps(details))
                os.replace(temporary, note)
                return
            if stage is None or not note.exists() or stage not in ("", told):
                return
            seen += 1
            if stage in ("saving", "record", "scoring") or seen == nth:
                (folder / "stage").write_text(told)
                die = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                die.start() if delay else os.kill(os.getpid(), signal.SIGKILL)

        with heartbeat.listening(listen):
            task_train(task(seed, devices), which, run=earlier)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder: Path, kills: int, devices: int) -> None:
    """Kill until all kills are done, then let the last task come to its end."""
    draw = random.Random(0)
    if devices > 1:
        from forked_ranks import ForkedRank

        ranks.RankProcess = ForkedRank  # type: ignore[misc]
    rounds: list[dict[str, Any]] = []
    where: Counter[str] = Counter()
    while sum(where.values()) < kills or not rounds:
        number = len(rounds)
        assert attempt(folder, number, devices, "whole", None, draw) == 0
        while True:
            done = sum(where.values())
            stage = STAGES[done % len(STAGES)] if done < kills else None
            draw.random()  # a child's draws are its own: the next one begins elsewhere
            code = attempt(folder, number, devices, "killed", stage, draw)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            where[(folder / "stage").read_text()] += 1
        ids = {w: json.loads((folder / f"{w}-{number}.json").read_text()) for w in EXPERIMENTS}
        rounds.append({w: i["recorder_id"] for w, i in ids.items()})
    print(json.dumps({"rounds": rounds, "kills": where}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
