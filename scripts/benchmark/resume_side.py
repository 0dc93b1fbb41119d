"""Benchmark the cost of checkpoints, and the start of a training from one.

    python scripts/benchmark/resume_side.py resume --provider FOLDER --work DIR

Uses the benchmark's MLP, which has the shortest epochs (about 880,000 samples). Compares fits of
`EPOCHS` epochs with a checkpoint after each epoch to fits without, alternately; and the time from
`fit` to the first epoch with and without resuming from a checkpoint. Prints one line of JSON with
the minimum seconds over the repeats, because the difference is smaller than the noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from qtorch_side import BATCH, lstm_dataset

from qtorch.model import LightningModel
from qtorch.model.loop.checkpoint import LAST

EPOCHS = 4


class FirstEpochTimer(pl.Callback):
    """Stores the time at which the first epoch started."""

    def __init__(self) -> None:
        self.start_time = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start_time = self.start_time or time.perf_counter()


def measure_fit(
    dataset: Any, epochs: int, folder: Path | None, resume: bool
) -> tuple[float, float]:
    """Seconds of a fit, and seconds until its first epoch started."""
    timer = FirstEpochTimer()
    model = LightningModel(
        {"_target_": "qtorch.nn.MLP", "layers": [32], "dropout": 0.0},
        optimizer={"_target_": "torch.optim.Adam", "lr": 1e-3},
        batch={"size": BATCH},
        trainer={"max_epochs": epochs, "enable_progress_bar": False},
        checkpoint={"enabled": False} if folder is None else {"dir": str(folder)},
        callbacks=[timer],
        seed=0,
    )
    start = time.perf_counter()
    model.fit(dataset, resume="auto" if resume else None)
    return time.perf_counter() - start, timer.start_time - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", required=True)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = lstm_dataset(args, windows=False)
    folder = Path(args.work) / "checkpoints"
    measure_fit(dataset, 1, None, False)  # warm-up: computes the features
    times: dict[str, list[float]] = {n: [] for n in ("with", "without", "fresh", "resumed")}
    for _ in range(args.repeats):
        shutil.rmtree(folder, ignore_errors=True)
        fit_seconds, first_seconds = measure_fit(dataset, EPOCHS, folder, False)
        times["with"].append(fit_seconds)
        times["fresh"].append(first_seconds)
        times["without"].append(measure_fit(dataset, EPOCHS, None, False)[0])
        times["resumed"].append(measure_fit(dataset, EPOCHS + 1, folder, True)[1])
    result: dict[str, Any] = {name: min(seconds) for name, seconds in times.items()}
    result["size"] = (folder / LAST).stat().st_size
    print(json.dumps({**result, "epochs": EPOCHS}))


if __name__ == "__main__":
    main()
