"""What checkpoints cost, and a start from one.

    python scripts/benchmark/resume_side.py resume --provider FOLDER --work DIR

The MLP of the benchmark, whose epochs of some 880,000 samples are the shortest: fits of `EPOCHS`
epochs with a checkpoint after each beside fits without, in turns; and the time from `fit` to its
first batch, from a checkpoint and without one. Prints one line of JSON, in seconds, the shortest of
the repeats: the difference is smaller than what else a machine does.
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
from qtorch.model.checkpoint import LAST

EPOCHS = 4


class FirstBatch(pl.Callback):
    """When the first training step began."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.at = self.at or time.perf_counter()


def fitted(dataset: Any, epochs: int, folder: Path | None, resume: bool) -> tuple[float, float]:
    """Seconds of a fit, and of those until its first epoch."""
    first = FirstBatch()
    model = LightningModel(
        {"_target_": "qtorch.nn.MLP", "layers": [32], "dropout": 0.0},
        optimizer={"_target_": "torch.optim.Adam", "lr": 1e-3},
        batch={"size": BATCH},
        trainer={"max_epochs": epochs, "enable_progress_bar": False},
        checkpoint={"enabled": False} if folder is None else {"dir": str(folder)},
        callbacks=[first],
        seed=0,
    )
    begin = time.perf_counter()
    model.fit(dataset, resume="auto" if resume else None)
    return time.perf_counter() - begin, first.at - begin


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
    fitted(dataset, 1, None, False)  # the features are made now
    times: dict[str, list[float]] = {n: [] for n in ("with", "without", "fresh", "resumed")}
    for _ in range(args.repeats):
        shutil.rmtree(folder, ignore_errors=True)
        whole, first = fitted(dataset, EPOCHS, folder, False)
        times["with"].append(whole)
        times["fresh"].append(first)
        times["without"].append(fitted(dataset, EPOCHS, None, False)[0])
        times["resumed"].append(fitted(dataset, EPOCHS + 1, folder, True)[1])
    told: dict[str, Any] = {name: min(found) for name, found in times.items()}
    told["size"] = (folder / LAST).stat().st_size
    print(json.dumps({**told, "epochs": EPOCHS}))


if __name__ == "__main__":
    main()
