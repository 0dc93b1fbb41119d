"""Benchmark the overhead of a task pool: TrainerRM against TrainerR on the same tiny tasks.

    python scripts/benchmark/pooled_side.py pooled [--tasks 3] [--repeats 9] [--threads 1]

A task trains an LSTM for one epoch on the synthetic market of thirty instruments; the pool is an
SQLite file. Both trainers run in this process in rounds of alternating order, after one warm-up
round. Prints one line of JSON: the medians of the wall and CPU seconds per task, and the median
and quartiles of the ratio within a round (other load of the machine affects both sides alike).
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
    parser.add_argument("--provider", help="not used: the market is synthetic")
    parser.add_argument("--work", help="parent of the temporary folders")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        print(json.dumps(measure(args, folder)))


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Seconds per task with and without the pool."""
    import torch

    import qtorch
    from qtorch.cli.compose import compose_settings, resolve_segments
    from qtorch.core.runtime import configure_logging
    from qtorch.trainer import TrainerR, TrainerRM

    configure_logging(logging.WARNING)
    torch.set_num_threads(args.threads)
    store, pool = f"sqlite:///{folder}/runs.db", f"sqlite:///{folder}/tasks.db"
    qtorch.init(tracking_uri=store, task_url=pool)
    overrides = ["debug=tiny", "callbacks=no_stop", "+trainer.enable_progress_bar=false"]
    base = resolve_segments(compose_settings("train", overrides)["task"])
    num_created = 0

    def create_tasks() -> list[dict[str, Any]]:
        nonlocal num_created
        num_created += args.tasks
        return [{**base, "seed": num_created + k} for k in range(args.tasks)]

    def time_trainer(trainer: Callable[[Any], Any]) -> tuple[float, float]:
        tasks = create_tasks()
        wall, cpu = time.perf_counter(), time.process_time()
        trainer(tasks)
        ends = time.perf_counter() - wall, time.process_time() - cpu
        return ends[0] / args.tasks, ends[1] / args.tasks

    trainers = {"here": TrainerR("here"), "pooled": TrainerRM("pooled")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for turn in range(args.repeats + 1):
        for name in sorted(trainers, reverse=bool(turn % 2)):
            result = time_trainer(trainers[name])
            if turn:
                times[name].append(result)
    report: dict[str, Any] = {}
    for name, rows in times.items():
        report[name], report[f"{name}_cpu"] = (median(column) for column in zip(*rows, strict=True))
    turns = list(zip(times["pooled"], times["here"], strict=True))
    for k, name in enumerate(("ratio", "cpu_ratio")):
        ratios = [pooled_times[k] / local_times[k] for pooled_times, local_times in turns]
        report[name] = median(ratios)
        report[f"{name}_quartiles"] = quantiles(ratios, n=4)[::2]
    return report


if __name__ == "__main__":
    main()
