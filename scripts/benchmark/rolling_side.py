"""Benchmark a rolling study with shared features against one whose windows compute their own.

    python rolling_side.py rolling --provider FOLDER [--universe nyse500] [--tasks 40] [--threads 2]

FOLDER holds bars in Qlib's layout. Both studies have the same tasks (all columns of Alpha158, one
year of training, a small network). One study reads the features that its first window computed,
the other computes them in every window. The studies run alternately, each in a process of its own
whose imports are not timed. Prints one line of JSON: total seconds, CPU seconds, seconds by part,
and the ratios.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

SHARED, SEPARATE = "shared", "own"
TRAIN_DAYS, VALID_DAYS, STEP = 240, 40, 20


def build_task(args: argparse.Namespace) -> dict[str, Any]:
    """The task to roll, with a test segment of `--tasks` windows at the end of the calendar."""
    from qtorch.data.source.qlib import QlibSource

    days = QlibSource(args.provider).calendar()
    ends = [len(days) - 1 - args.tasks * STEP]
    ends = [ends[0] - VALID_DAYS - TRAIN_DAYS, ends[0] - VALID_DAYS, ends[0], len(days) - 1]
    spans = [[f"{days[a + 1]:%Y-%m-%d}", f"{days[b]:%Y-%m-%d}"] for a, b in pairwise(ends)]
    return {
        "model": {
            "_target_": "qtorch.model.LightningModel",
            "network": {"_target_": "qtorch.nn.MLP", "layers": [16], "dropout": 0.0},
            "batch": {"size": 8000},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            "checkpoint": {"enabled": False},
        },
        "dataset": {
            "_target_": "qtorch.data.DatasetH",
            "handler": {
                "_target_": "qtorch.data.Alpha158",
                "source": {"_target_": "qtorch.data.QlibSource", "provider_uri": args.provider},
                "instruments": args.universe,
                "infer_processors": [
                    {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
                    {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
                ],
                "learn_processors": [
                    {"class": "DropnaLabel"},
                    {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
                ],
            },
            "segments": dict(zip(("train", "valid", "test"), spans, strict=True)),
        },
        "record": ["SignalRecord", "SigAnaRecord"],
        "seed": 0,
    }


@contextmanager
def time_parts() -> Iterator[dict[str, float]]:
    """Sum up the seconds of features, training and prediction over the windows."""
    from qtorch.data.handler.loader import QlibDataLoader
    from qtorch.model.lightning_model import LightningModel

    seconds_by_part: dict[str, float] = defaultdict(float)

    def add_timing(cls: type, name: str, part: str) -> None:
        method = getattr(cls, name)

        def wrapper(self: Any, *args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(self, *args, **options)
            finally:
                seconds_by_part[part] += time.perf_counter() - start

        setattr(cls, name, wrapper)

    add_timing(QlibDataLoader, "view", "features")
    add_timing(LightningModel, "fit", "features, processors and training")
    add_timing(LightningModel, "predict", "prediction")
    yield seconds_by_part


def run_study(args: argparse.Namespace) -> dict[str, Any]:
    """Run one study in this process."""
    import torch

    torch.set_num_threads(args.threads)
    import pytorch_lightning  # noqa: F401

    import qtorch
    from qtorch import R
    from qtorch.study import rolling_study
    from qtorch.trainer import TrainerR

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.chdir(folder)
        qtorch.init(tracking_uri=f"sqlite:///{folder}/runs.db")
        R.get_exp(experiment_name="bench")  # creates the store before the timing starts
        with time_parts() as seconds_by_part:
            start, cpu = time.perf_counter(), time.process_time()
            result = rolling_study(
                build_task(args),
                TrainerR("bench"),
                step=STEP,
                rtype="sliding",
                cache=str(Path(folder, "features")) if args.study == SHARED else False,
                experiment_name="bench",
            )
            seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "windows": len(result.windows),
            "parts": {k: round(v, 3) for k, v in seconds_by_part.items()},
            "score": float(result.prediction["score"].sum()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=("rolling",))
    parser.add_argument("--provider", required=True, type=os.path.abspath)
    parser.add_argument(
        "--work", dest="folder", type=os.path.abspath, help="folder for runs and features"
    )
    parser.add_argument("--universe", default="nyse500")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--study", choices=(SHARED, SEPARATE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.study:
        print(json.dumps(run_study(args)))
        return
    runs_by_kind: dict[str, list[dict[str, Any]]] = {SHARED: [], SEPARATE: []}
    for _ in range(args.repeats):
        for kind in (SHARED, SEPARATE):
            command = [sys.executable, *sys.argv, "--study", kind]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            process = subprocess.run(command, capture_output=True, text=True, env=environment)
            if process.returncode:
                sys.exit(process.stderr[-3000:])
            runs_by_kind[kind].append(json.loads(process.stdout.strip().splitlines()[-1]))
    scores = {run["score"] for runs in runs_by_kind.values() for run in runs}
    shared_seconds, separate_seconds = (
        median(run["seconds"] for run in runs_by_kind[kind]) for kind in (SHARED, SEPARATE)
    )
    cpu = {
        kind: round(median(run["cpu"] for run in runs), 2) for kind, runs in runs_by_kind.items()
    }
    print(
        json.dumps(
            {
                "windows": runs_by_kind[SHARED][0]["windows"],
                "shared": shared_seconds,
                "own": separate_seconds,
                "ratio": separate_seconds / shared_seconds,
                "cpu": cpu,
                "cpu_ratio": cpu[SEPARATE] / cpu[SHARED],
                "equal": len(scores) == 1,
                "parts": {kind: runs[-1]["parts"] for kind, runs in runs_by_kind.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
