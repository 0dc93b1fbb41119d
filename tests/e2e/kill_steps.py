"""Train one task in processes that are killed repeatedly; run as a script.

    python kill_steps.py FOLDER KILLS DEVICES [SEED]

Every attempt is a real process (forked from this one, which has done its imports and trained once)
that dies by SIGKILL at a random moment in one of the stages of a task: at a heartbeat, shortly
after one, or while it writes a checkpoint or an artifact (between two changes to files, or in the
middle of a file). On two DEVICES either a rank or the parent of both is killed. No kill comes
before the run is created, because there is nothing to resume yet.

If a task ends before KILLS kills are done, the next task follows, with another seed. Each task is
also trained without kills. Prints JSON: `{"rounds": [{"whole": id, "killed": id}],
"kills": {stage: count}, "inside": {stage: [file, ...]}, "ranks": [rank, ...]}`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.store.artifact.artifact_repository_registry
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch
from matplotlib.figure import Figure

import qtorch.model.devices.rank_training
import qtorch.model.lightning_model
import qtorch.record.signal
import qtorch.tracking.mlflow_store
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import set_defaults
from qtorch.model.devices.ranks import RankError
from qtorch.process import heartbeat
from qtorch.process.child import Child
from qtorch.trainer.run import task_train

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "model")]  # for forked_process and forked_ranks


@dataclass(frozen=True)
class KillPoint:
    """When to kill: the stage ("" is any), whether inside the writing of a file, and which rank."""

    stage: str
    inside: bool = False
    rank: int | None = None


# Used in turn. Stages that occur once per task come last, so that few tasks suffice for many kills.
SINGLE_DEVICE_KILLS = (
    KillPoint("training"),
    KillPoint("checkpoint", inside=True),
    KillPoint("validation"),
    KillPoint("checkpoint", inside=True),
    KillPoint(""),
    KillPoint("training"),
    KillPoint("checkpoint"),
    KillPoint("saving", inside=True),
    KillPoint("record", inside=True),
    KillPoint("scoring"),
)
TWO_DEVICE_KILLS = (
    KillPoint("training", rank=0),
    KillPoint("validation", rank=1),
    KillPoint("checkpoint"),
    KillPoint("training", rank=1),
    KillPoint("checkpoint", rank=0),
    KillPoint("training"),
    KillPoint("saving", inside=True),
)
RANK_LOST = 3  # exit code of a parent whose rank was killed
# Audit events of changes to files; "open" is raised before the file is created.
CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.chmod", "os.mkdir")
EXPERIMENTS = ("whole", "killed")


def task(seed: int, devices: int) -> dict[str, Any]:
    """Return a small training with everything that a checkpoint has to restore, and two records."""
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


def prepare_process(devices: int) -> None:
    """Do the slow first steps once for all attempts, and replace what attempts do not need."""
    quick_task = task(0, 1)
    model = init_instance_by_config(quick_task["model"])
    model.trainer["max_epochs"] = 1
    model.fit(init_instance_by_config(quick_task["dataset"]))
    qtorch.record.signal.ic_chart = lambda *_: Figure((1, 1))  # type: ignore[assignment]
    if devices > 1:
        from forked_ranks import fork_ranks_in_place

        fork_ranks_in_place(rank_children)
    gc.freeze()  # garbage collections in the children would copy all memory pages


rank_children: list[Child] = []  # this process's ranks


class Killer:
    """Listens to the heartbeats of this process and kills it at the planned point."""

    def __init__(
        self, folder: Path, run_file: Path, kill_point: KillPoint | None, draw: random.Random
    ) -> None:
        self.folder, self.run_file, self.kill_point = folder, run_file, kill_point
        self.pid = os.getpid()
        self.delay = draw.choice((0.0, draw.random() * 0.03))
        once = kill_point is not None and kill_point.stage in ("saving", "record", "scoring")
        self.beats_left = 1 if once else draw.randint(1, 4)  # heartbeats left until the kill
        self.changes_left = 0  # file changes left until the kill
        self.num_changes = draw.randint(
            1, 7 if kill_point and kill_point.stage == "checkpoint" else 25
        )

    def listen(self, stage: str, details: dict[str, Any]) -> None:
        if os.getpid() != self.pid:  # in a rank that was forked from this process
            return
        if stage == heartbeat.RUN:
            temporary = self.run_file.with_suffix(".new")
            temporary.write_text(json.dumps(details))
            os.replace(temporary, self.run_file)
            return
        kill_point = self.kill_point
        if kill_point is None or not self.run_file.exists() or kill_point.stage not in ("", stage):
            return
        self.beats_left -= 1
        if self.beats_left == 0 and kill_point.inside:
            self.changes_left = self.num_changes
            sys.addaudithook(self.on_file_change)
        elif self.beats_left == 0:
            self.record_kill(stage)
            self.kill(kill_point.rank)

    def on_file_change(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the changes to the run's files (in the checkpoint stage, only to checkpoints)."""
        if self.changes_left == 0 or event not in CHANGES or os.getpid() != self.pid:
            return
        path, stage = str(arguments[0]), self.kill_point.stage  # type: ignore[union-attr]
        is_artifact = path.startswith(str(self.folder / "artifacts"))
        if not is_artifact or (stage == "checkpoint") != ("/checkpoints/" in path):
            return
        self.changes_left -= 1
        if self.changes_left == 0:
            self.record_kill(stage, f"{event} {Path(path).name}")
            if event != "open":
                self.delay = 0.0  # exactly between this change and the previous one
            self.kill()

    def record_kill(self, stage: str, change: str = "") -> None:
        rank = None if self.kill_point is None else self.kill_point.rank
        (self.folder / "kill").write_text(json.dumps([stage, change, rank]))

    def kill(self, rank: int | None = None) -> None:
        if rank is not None:
            # The rank may have ended since its heartbeat; then nothing is killed in this attempt.
            with suppress(ProcessLookupError):
                os.kill(rank_children[rank].pid, signal.SIGKILL)
        elif self.delay:  # an unhandled alarm kills a process at any point, too
            signal.setitimer(signal.ITIMER_REAL, self.delay / 3)
        else:
            os.kill(self.pid, signal.SIGKILL)


def run_attempt(
    folder: Path,
    seed: int,
    devices: int,
    experiment: str,
    kill_point: KillPoint | None,
    draw: random.Random,
) -> int:
    """Train the task in a child process, in the run of an earlier attempt; return the exit code."""
    run_file = folder / f"{experiment}-{seed}.json"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        set_defaults(tracking_uri=f"sqlite:///{folder / 'runs.db'}")
        heartbeat.PAUSE_SECONDS = 0.0
        earlier_run = json.loads(run_file.read_text()) if run_file.exists() else None
        with heartbeat.listen(Killer(folder, run_file, kill_point, draw).listen):
            task_train(task(seed, devices), experiment, run=earlier_run)
        code = 0
    except RankError:
        code = RANK_LOST
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def main(folder: Path, kills: int, devices: int, seed: int = 0) -> None:
    """Kill attempts until all kills are done, then let the last task finish."""
    draw = random.Random(seed)
    kill_points = SINGLE_DEVICE_KILLS if devices == 1 else TWO_DEVICE_KILLS
    prepare_process(devices)
    rounds: list[dict[str, Any]] = []
    kills_by_stage: Counter[str] = Counter()
    inside: dict[str, list[str]] = {}
    killed_ranks: list[int] = []
    while sum(kills_by_stage.values()) < kills or not rounds:
        number = len(rounds)
        assert run_attempt(folder, number, devices, "whole", None, draw) == 0
        while True:
            num_kills = sum(kills_by_stage.values())
            kill_point = kill_points[num_kills % len(kill_points)] if num_kills < kills else None
            # Children draw from a copy of the generator: advance it for the next child.
            draw.random()
            code = run_attempt(folder, number, devices, "killed", kill_point, draw)
            if code == 0:
                break
            stage, change, rank = json.loads((folder / "kill").read_text())
            assert code in ((-signal.SIGKILL, -signal.SIGALRM) if rank is None else (RANK_LOST,))
            kills_by_stage[stage] += 1
            if change:
                inside.setdefault(stage, []).append(change)
            if rank is not None:
                killed_ranks.append(rank)
        ids = {w: json.loads((folder / f"{w}-{number}.json").read_text()) for w in EXPERIMENTS}
        rounds.append({w: i["recorder_id"] for w, i in ids.items()})
    print(
        json.dumps(
            {"rounds": rounds, "kills": kills_by_stage, "inside": inside, "ranks": killed_ranks}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
