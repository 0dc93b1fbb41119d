"""`qtorch worker`: work off a task pool, one training process for each device."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtorch.cli.options import count, needed, options_of, seconds, switch
from qtorch.cli.task_text import counts_of, counts_text
from qtorch.core.errors import ConfigError
from qtorch.core.runtime import configure_logging
from qtorch.task.devices import device_names
from qtorch.task.manager import TaskManager
from qtorch.task.slot import WorkerOptions
from qtorch.task.supervisor import Show, Supervisor
from qtorch.tracking.locations import redacted

USAGE = """\
qtorch worker: take tasks from a pool and train them, until told to stop

usage: qtorch worker pool=NAME [url=URL] [devices=auto] [per_device=1] [max_tasks=N]
                     [idle_timeout=SECONDS] [force_release=true] ...

  pool           the pool's name
  url            where the pool is: sqlite:///FILE, postgresql+psycopg://..., mongodb://...;
                 by default QTORCH_TASK_URL, else mlruns/tasks.db in this folder
  devices        auto (every GPU that this process may see, else the CPU), cpu, or GPUs: 0,1
  per_device     so many trainings at once on each
  max_tasks      end after so many tasks
  idle_timeout   end after so many seconds without work; without it the worker waits for more
  force_release  a process of its own for each task, so that a GPU's memory comes back whole
  experiment     MLflow's experiment for tasks that name none (by default the pool's name)
  tracking.uri   MLflow's store for all tasks, whatever they name
  lease          seconds after which the tasks of a dead worker are free again (60)
  hang_after     seconds without a sign of life after which a training is ended (600)
  grace          seconds for a checkpoint when the worker is told to stop (30)
  func, end_func what runs a waiting task, and one that a delayed trainer has begun
  table          true, false: the live table (by default on a terminal)
  logs           a folder for what the trainings print

Ctrl-C, SIGTERM and SIGUSR1 hand the tasks back, with their checkpoints; a second Ctrl-C ends at
once.
"""
READERS: dict[str, Callable[[str], Any]] = {
    "pool": str,
    "url": str,
    "devices": str,
    "per_device": count,
    "max_tasks": count,
    "idle_timeout": seconds,
    "force_release": switch,
    "experiment": str,
    "tracking.uri": str,
    "lease": seconds,
    "hang_after": seconds,
    "grace": seconds,
    "func": str,
    "end_func": str,
    "table": switch,
    "logs": str,
    "log_level": str,
}


def main(argv: Sequence[str]) -> int:
    """Work; 0 where the work is done, 128 + the signal that stopped it, else 1."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    given = options_of(argv, READERS, "qtorch worker")
    options = worker_options(given)
    devices = device_names(given.get("devices"))
    devices = [d for d in devices for _ in range(given.get("per_device") or 1)]
    manager = TaskManager(options.pool, options.url, patience=10.0)
    told = counts_text(manager.task_stat()) or "no task yet"  # a wrong URL is said now
    manager.close()
    level = given.get("log_level") or "INFO"
    table = given.get("table")
    table = sys.stdout.isatty() if table is None else table
    logs = _log_folder(given.get("logs"), options.pool if table else None)
    configure_logging(logging.WARNING if table else level)
    os.environ["QTORCH_WORKER_LOG"] = level
    where = f", its trainings print into {logs}" if logs else ""
    print(f"worker {os.getpid()} on {', '.join(devices)}{where}")
    print(f"pool {options.pool} ({told}) in {redacted(manager.url)}", flush=True)
    with _shown(options.pool, table) as show:
        supervisor = Supervisor(options, devices, show=show, logs=logs)
        code = supervisor.run()
    totals = counts_of([slot.view for slot in supervisor.slots])
    print("ended: " + ", ".join(f"{number} {name}" for name, number in totals.items()))
    for error in {str(slot.error) for slot in supervisor.slots if slot.error is not None}:
        print(f"error: {error}", file=sys.stderr)
    return code


def worker_options(given: dict[str, Any]) -> WorkerOptions:
    """The worker's options from the command's."""
    pool = needed(given, "pool", "qtorch worker")
    functions = dict(WorkerOptions(pool).functions)
    for name, status in (("func", "waiting"), ("end_func", "part_done")):
        if given.get(name):
            functions[status] = given[name]
    plain = ("url", "lease", "max_tasks", "idle_timeout", "force_release", "hang_after", "grace")
    chosen = {name: given[name] for name in plain if given.get(name) is not None}
    if chosen.get("lease") == 0:
        raise ConfigError("lease=0: a lease is a number of seconds above 0.")
    return WorkerOptions(
        pool,
        functions=functions,
        experiment=given.get("experiment"),
        tracking_uri=given.get("tracking.uri"),
        **chosen,
    )


def _log_folder(given: str | None, pool: str | None) -> Path | None:
    """Where the trainings print: the given folder; under a live table a folder of its own."""
    if given is None and pool is None:
        return None
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(given) if given else Path("outputs", f"worker_{pool}_{stamp}_{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _shown(pool: str, table: bool) -> Iterator[Show | None]:
    """The live table, where one is wanted."""
    if not table:
        yield None
        return
    from rich.live import Live

    from qtorch.cli.worker_table import worker_table

    with Live(worker_table(pool, []), auto_refresh=False) as live:
        yield lambda views: live.update(worker_table(pool, views), refresh=True)
