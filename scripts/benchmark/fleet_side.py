"""Benchmark a fleet of seeds against TrainerR, which trains the same tasks one after another.

    python scripts/benchmark/fleet_side.py small_mlp [--threads 1]

The whole work is measured, with runs, predictions and records, in processor time: data are built,
runs are created in a store of their own, and models are saved. Works: small_mlp (a step of about a
millisecond), lstm_800 and lstm_100 (two layers of 64, by batch size), dlinear, stockmixer, rolling
(windows of a study). Prints one line of JSON, in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from qtorch.data.handler.alpha import SELECTED_20

WINDOW_WORKS = ("rolling",)
NETWORKS: dict[str, dict[str, Any]] = {
    "small_mlp": {"_target_": "qtorch.nn.MLP", "layers": [64], "dropout": 0.0},
    "lstm_800": {"_target_": "qtorch.nn.LSTM", "hidden_size": 64, "num_layers": 2},
    "lstm_100": {"_target_": "qtorch.nn.LSTM", "hidden_size": 64, "num_layers": 2},
    "dlinear": {"_target_": "qtorch.nn.DLinear"},
    "stockmixer": {"_target_": "qtorch.nn.StockMixer"},
    "rolling": {"_target_": "qtorch.nn.GRU", "hidden_size": 8, "num_layers": 1},
}
BATCH_SIZES = {"small_mlp": 256, "lstm_100": 100, "rolling": 200}
MEMBERS = {"small_mlp": 20, "dlinear": 20}
EPOCHS = {"small_mlp": 10, "dlinear": 4, "stockmixer": 2, "rolling": 4}


def make_task(work: str, seed: int) -> dict[str, Any]:
    """Return the task of a seed, on the 20 features of Qlib's benchmarks, 50 stocks and 3 years."""
    is_day = work == "stockmixer"
    batch = {"size": BATCH_SIZES.get(work, 800), "order": "day" if is_day else "random"}
    return {
        "model": {
            "_target_": "qtorch.model.LightningModel",
            "network": NETWORKS[work],
            "batch": batch,
            "trainer": {"max_epochs": EPOCHS.get(work, 1), "accelerator": "cpu"},
        },
        "dataset": {
            "_target_": "qtorch.data.TSDatasetH",
            "step_len": 1 if work == "small_mlp" else 20,
            "handler": {
                "_target_": "qtorch.data.Alpha158",
                "source": {"_target_": "qtorch.data.SyntheticSource", "num_instruments": 50},
                "start_time": "2016-01-01",
                "end_time": "2018-12-31",
                "infer_processors": [
                    {"class": "FilterCol", "kwargs": {"col_list": list(SELECTED_20)}},
                    "RobustZScoreNorm",
                    "Fillna",
                ],
                "learn_processors": ["DropnaLabel"],
            },
            "segments": {
                "train": ["2016-03-01", "2017-12-31"],
                "valid": ["2018-01-01", "2018-05-31"],
                "test": ["2018-06-01", "2018-12-20"],
            },
        },
        "record": ["SignalRecord"],
        "seed": seed,
    }


def measure(function: Callable[[], Any]) -> dict[str, float]:
    """Return wall and processor seconds of a call."""
    begin, used = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - begin, "processor": time.process_time() - used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=sorted(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", help="not used: the market is synthetic")
    parser.add_argument("--work", dest="folder", help="parent of the temporary folder")
    args = parser.parse_args()
    import torch

    from qtorch.core.runtime import configure_logging

    torch.set_num_threads(args.threads)
    configure_logging("ERROR")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.chdir(folder)
        print(json.dumps(run_work(args.work)))


def run_work(work: str) -> dict[str, Any]:
    from qtorch.study.rolling import rolling_study
    from qtorch.trainer import FleetTrainer, TrainerR

    TrainerR("warm")(make_task(work, 100))  # imports and the feature cache
    gc.freeze()  # qtorch's commands do so too after their imports
    trainers = {"serial": TrainerR, "fleet": FleetTrainer}
    result: dict[str, Any] = {"members": MEMBERS.get(work, 8)}
    for name, trainer in trainers.items():
        if work in WINDOW_WORKS:
            seconds = measure(
                lambda t=trainer, n=name: rolling_study(make_task(work, 0), t(n), step=4)
            )
        else:
            tasks = [make_task(work, seed) for seed in range(result["members"])]
            seconds = measure(partial(trainer(name), tasks))
        result |= {f"{name}_{clock}": round(value, 2) for clock, value in seconds.items()}
        result[f"{name}_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


if __name__ == "__main__":
    main()
