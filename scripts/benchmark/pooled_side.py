"""What a task pool adds to a tiny training: TrainerRM beside TrainerR on the same tasks.

    python scripts/benchmark/pooled_side.py pooled [--tasks 3] [--repeats 9] [--threads 1]

The tasks are an LSTM for one epoch on the embedded market of thirty instruments, the pool is an
SQLite file. Both trainers run in this process, in turns whose order alternates, after one of each
that is not counted. Prints one line of JSON: medians of the seconds and processor seconds a task,
and of the ratio within a turn (what else the machine does meets both sides of it alike), with the
quarter of the turns below and above.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["pooled"])
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", help="not used: the market is embedded")
    parser.add_argument("--work", help="where temporary folders are made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        print(json.dumps(measured(args, folder)))


def measured(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Seconds a task with and without the pool."""
    import torch

    import qtorch
    from qtorch.cli.compose import composed
    from qtorch.cli.segments import with_dates
    from qtorch.core.runtime import configure_logging
    from qtorch.trainer import TrainerR, TrainerRM

    configure_logging(logging.WARNING)
    torch.set_num_threads(args.threads)
    store, pool = f"sqlite:///{folder}/runs.db", f"sqlite:///{folder}/tasks.db"
    qtorch.init(tracking_uri=store, task_url=pool)
    quiet = ["debug=tiny", "callbacks=no_stop", "+trainer.enable_progress_bar=false"]
    base = with_dates(composed("train", quiet)["task"])
    made = 0

    def fresh() -> list[dict[str, Any]]:
        nonlocal made
        made += args.tasks
        return [{**base, "seed": made + k} for k in range(args.tasks)]

    def timed(trainer: Callable[[Any], Any]) -> tuple[float, float]:
        tasks = fresh()
        wall, used = time.perf_counter(), time.process_time()
        trainer(tasks)
        ends = time.perf_counter() - wall, time.process_time() - used
        return ends[0] / args.tasks, ends[1] / args.tasks

    ways = {"here": TrainerR("here"), "pooled": TrainerRM("pooled")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name in sorted(ways, reverse=bool(turn % 2)):
            figures = timed(ways[name])
            if turn:
                found[name].append(figures)
    told: dict[str, Any] = {}
    for name, rows in found.items():
        told[name], told[f"{name}_cpu"] = (median(column) for column in zip(*rows, strict=True))
    turns = list(zip(found["pooled"], found["here"], strict=True))
    for k, name in enumerate(("ratio", "cpu_ratio")):
        ratios = [pooled[k] / here[k] for pooled, here in turns]
        told[name] = median(ratios)
        told[f"{name}_quartiles"] = quantiles(ratios, n=4)[::2]
    return told


if __name__ == "__main__":
    main()
