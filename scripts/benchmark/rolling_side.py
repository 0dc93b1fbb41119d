"""A rolling study whose windows share features, beside one where each computes its own.

    python rolling_side.py rolling --provider FOLDER [--universe nyse500] [--tasks 40] [--threads 2]

FOLDER holds bars in Qlib's layout. Both studies are the same tasks (Alpha158 with all its columns,
trained on a year, a small network); the one reads the features that its first window computed,
the other computes them in every window. Each runs in a process of its own, imports outside the
timing, in turns. Prints one line of JSON: seconds in all, of processor time and by part, and the
ratios.
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

SHARED, OWN = "shared", "own"
TRAIN_DAYS, VALID_DAYS, STEP = 240, 40, 20


def task(args: argparse.Namespace) -> dict[str, Any]:
    """The task that is rolled: its test segment makes `--tasks` windows at the calendar's end."""
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
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds in features, in training and in scoring, summed over the windows."""
    from qtorch.data.loader import QlibDataLoader
    from qtorch.model.lightning_model import LightningModel

    spent: dict[str, float] = defaultdict(float)

    def timed(cls: type, name: str, part: str) -> None:
        real = getattr(cls, name)

        def wrapper(self: Any, *given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return real(self, *given, **options)
            finally:
                spent[part] += time.perf_counter() - begin

        setattr(cls, name, wrapper)

    timed(QlibDataLoader, "view", "features")
    timed(LightningModel, "fit", "features, processors and training")
    timed(LightningModel, "predict", "prediction")
    yield spent


def study(args: argparse.Namespace) -> dict[str, Any]:
    """One study in this process."""
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
        R.get_exp(experiment_name="bench")  # the store's own start is no part of a study
        with timed_parts() as spent:
            begin, cpu = time.perf_counter(), time.process_time()
            result = rolling_study(
                task(args),
                TrainerR("bench"),
                step=STEP,
                rtype="sliding",
                cache=str(Path(folder, "features")) if args.study == SHARED else False,
                experiment_name="bench",
            )
            seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "windows": len(result.windows),
            "parts": {k: round(v, 3) for k, v in spent.items()},
            "score": float(result.prediction["score"].sum()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=("rolling",))
    parser.add_argument("--provider", required=True, type=os.path.abspath)
    parser.add_argument("--work", dest="folder", type=os.path.abspath, help="for runs and features")
    parser.add_argument("--universe", default="nyse500")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--study", choices=(SHARED, OWN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.study:
        print(json.dumps(study(args)))
        return
    told: dict[str, list[dict[str, Any]]] = {SHARED: [], OWN: []}
    for _ in range(args.repeats):
        for kind in (SHARED, OWN):
            command = [sys.executable, *sys.argv, "--study", kind]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            told[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
    scores = {run["score"] for runs in told.values() for run in runs}
    shared, own = (median(run["seconds"] for run in told[kind]) for kind in (SHARED, OWN))
    cpu = {kind: round(median(run["cpu"] for run in runs), 2) for kind, runs in told.items()}
    print(
        json.dumps(
            {
                "windows": told[SHARED][0]["windows"],
                "shared": shared,
                "own": own,
                "ratio": own / shared,
                "cpu": cpu,
                "cpu_ratio": cpu[OWN] / cpu[SHARED],
                "equal": len(scores) == 1,
                "parts": {kind: runs[-1]["parts"] for kind, runs in told.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
