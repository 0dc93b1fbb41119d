"""Trains one task again and again in processes that are killed; run as a script.

    python kill_steps.py FOLDER KILLS DEVICES

Every attempt is a real process (forked from this one, which has its imports done and has trained
once) that ends by SIGKILL at a moment drawn from the stages that a task goes through: at a
heartbeat, soon after one, or inside the writing of a checkpoint or an artifact, between two
changes to files or in the middle of a file. On two DEVICES it is one of the ranks that dies or
the parent of both. (Before the run is made there is nothing to go on from: no kill comes then.)

A task that came to its end before KILLS were done is followed by the next one, with another seed.
Each of them is also trained undisturbed. Prints JSON: `{"rounds": [{"whole": id, "killed": id}],
"kills": {stage: count}, "inside": {stage: [file, ...]}, "ranks": [rank, ...]}`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.store.artifact.artifact_repository_registry
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch
from matplotlib.figure import Figure

import qtorch.model.lightning_model
import qtorch.model.rank_training
import qtorch.record.signal_analysis
import qtorch.tracking.mlflow_store
from qtorch.core import heartbeat
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import init
from qtorch.model import ranks
from qtorch.model.ranks import RankError
from qtorch.trainer.run import task_train

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))  # for forked_ranks


@dataclass(frozen=True)
class Moment:
    """When to die: in a stage ("" is any), inside the writing of a file, by which rank's death."""

    stage: str
    inside: bool = False
    rank: int | None = None


# In turns: what comes once a task at the end, so that few tasks bear many kills.
ALONE = (
    Moment("training"),
    Moment("checkpoint", inside=True),
    Moment("validation"),
    Moment("checkpoint", inside=True),
    Moment(""),
    Moment("training"),
    Moment("checkpoint"),
    Moment("saving", inside=True),
    Moment("record", inside=True),
    Moment("scoring"),
)
SHARED = (
    Moment("training", rank=0),
    Moment("validation", rank=1),
    Moment("checkpoint"),
    Moment("training", rank=1),
    Moment("checkpoint", rank=0),
    Moment("training"),
    Moment("saving", inside=True),
)
RANK_LOST = 3  # the exit code of a parent whose rank was killed
# The changes to files that Python tells of; "open" is told of before a file is made.
CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.chmod", "os.mkdir")
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
        "learn_processors": ["DropnaLabel"],
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


def warm_up(devices: int) -> None:
    """What every attempt would have to find out anew, or does not need."""
    quick = task(0, 1)
    model = init_instance_by_config(quick["model"])
    model.trainer["max_epochs"] = 1
    model.fit(init_instance_by_config(quick["dataset"]))
    qtorch.record.signal_analysis.ic_chart = lambda *_: Figure((1, 1))  # type: ignore[assignment]
    if devices > 1:
        from forked_ranks import ForkedRank

        class Listed(ForkedRank):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                pids.append(self.pid)

        ranks.RankProcess = Listed  # type: ignore[misc]


pids: list[int] = []  # of this process's ranks


class Death:
    """Listens to the heartbeats of this process and ends it at its moment."""

    def __init__(
        self, folder: Path, note: Path, moment: Moment | None, draw: random.Random
    ) -> None:
        self.folder, self.note, self.moment = folder, note, moment
        self.own = os.getpid()
        self.delay = draw.choice((0.0, draw.random() * 0.03))
        once = moment is not None and moment.stage in ("saving", "record", "scoring")
        self.beats = 1 if once else draw.randint(1, 4)  # left to be heard
        self.changes = 0  # left to be seen
        self.drawn = draw.randint(1, 7 if moment and moment.stage == "checkpoint" else 25)

    def listen(self, told: str, details: dict[str, Any]) -> None:
        if os.getpid() != self.own:  # a rank, forked from here
            return
        if told == heartbeat.RUN:
            temporary = self.note.with_suffix(".new")
            temporary.write_text(json.dumps(details))
            os.replace(temporary, self.note)
            return
        moment = self.moment
        if moment is None or not self.note.exists() or moment.stage not in ("", told):
            return
        self.beats -= 1
        if self.beats == 0 and moment.inside:
            self.changes = self.drawn
            sys.addaudithook(self.look)
        elif self.beats == 0:
            self.tell(told)
            self.end(moment.rank)

    def look(self, event: str, told: tuple[Any, ...]) -> None:
        """Count the changes to the run's files (of a checkpoint's stage to checkpoints alone)."""
        if self.changes == 0 or event not in CHANGES or os.getpid() != self.own:
            return
        path, stage = str(told[0]), self.moment.stage  # type: ignore[union-attr]  # it has one
        ours = path.startswith(str(self.folder / "artifacts"))
        if not ours or (stage == "checkpoint") != ("/checkpoints/" in path):
            return
        self.changes -= 1
        if self.changes == 0:
            self.tell(stage, f"{event} {Path(path).name}")
            if event != "open":
                self.delay = 0.0  # between this change and the one before
            self.end()

    def tell(self, stage: str, change: str = "") -> None:
        rank = None if self.moment is None else self.moment.rank
        (self.folder / "death").write_text(json.dumps([stage, change, rank]))

    def end(self, rank: int | None = None) -> None:
        if rank is not None:
            os.kill(pids[rank], signal.SIGKILL)
        elif self.delay:  # an alarm that nobody hears ends a process where it stands, too
            signal.setitimer(signal.ITIMER_REAL, self.delay / 3)
        else:
            os.kill(self.own, signal.SIGKILL)


def attempt(
    folder: Path, seed: int, devices: int, which: str, moment: Moment | None, draw: random.Random
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
        with heartbeat.listening(Death(folder, note, moment, draw).listen):
            task_train(task(seed, devices), which, run=earlier)
        code = 0
    except RankError:
        code = RANK_LOST
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder: Path, kills: int, devices: int) -> None:
    """Kill until all kills are done, then let the last task come to its end."""
    draw = random.Random(0)
    moments = ALONE if devices == 1 else SHARED
    warm_up(devices)
    rounds: list[dict[str, Any]] = []
    where: Counter[str] = Counter()
    inside: dict[str, list[str]] = {}
    lost: list[int] = []
    while sum(where.values()) < kills or not rounds:
        number = len(rounds)
        assert attempt(folder, number, devices, "whole", None, draw) == 0
        while True:
            done = sum(where.values())
            moment = moments[done % len(moments)] if done < kills else None
            draw.random()  # a child's draws are its own: the next one begins elsewhere
            code = attempt(folder, number, devices, "killed", moment, draw)
            if code == 0:
                break
            stage, change, rank = json.loads((folder / "death").read_text())
            assert code in ((-signal.SIGKILL, -signal.SIGALRM) if rank is None else (RANK_LOST,))
            where[stage] += 1
            if change:
                inside.setdefault(stage, []).append(change)
            if rank is not None:
                lost.append(rank)
        ids = {w: json.loads((folder / f"{w}-{number}.json").read_text()) for w in EXPERIMENTS}
        rounds.append({w: i["recorder_id"] for w, i in ids.items()})
    print(json.dumps({"rounds": rounds, "kills": where, "inside": inside, "ranks": lost}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
