"""`qtorch worker`: train tasks from a pool, with one training process per device slot."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtorch.cli.guard import configure_process
from qtorch.cli.options import parse_bool, parse_count, parse_options, parse_seconds, require_option
from qtorch.cli.tables.tasks import task_counts_text, total_counts
from qtorch.core.errors import ConfigError, printable_text
from qtorch.core.secrets import redact_urls
from qtorch.core.session import WORKER_LOG_VARIABLE, resolve_path
from qtorch.task.devices import device_names
from qtorch.task.manager import TaskManager
from qtorch.task.stores.base import URL_FORMS
from qtorch.task.worker import Show, Supervisor, WorkerOptions

USAGE = f"""\
qtorch worker: train tasks from a task pool until stopped

usage: qtorch worker pool=NAME [url=URL] [devices=auto] [per_device=1] [max_tasks=N]
                     [idle_timeout=SECONDS] [force_release=true] ...

  pool           name of the pool
  url            database of the pool; default: QTORCH_TASK_URL, else mlruns/tasks.db in this folder
                 {URL_FORMS}
  devices        auto (all visible GPUs, else the CPU), cpu, or GPU indices: 0,1
  per_device     number of concurrent trainings on each device
  max_tasks      stop after so many tasks
  idle_timeout   stop after so many seconds without a task on any device; default: never
  force_release  true: run each task in a new process, so that all GPU memory is released
  experiment     MLflow experiment for tasks that do not name one (default: the pool's name)
  tracking.uri   MLflow tracking URI for all tasks; overrides the tasks' own
  lease          seconds after which tasks of a dead worker become available again (60)
  hang_after     kill a training after so many seconds without a heartbeat (600)
  grace          seconds to write a checkpoint when the worker is stopped (30)
  func, end_func functions that run waiting tasks, and part_done tasks of a delayed trainer
  table          true, false: show a live table (default: only on a terminal)
  logs           folder for the output of the trainings

Ctrl-C, SIGTERM and SIGUSR1 write checkpoints and return the tasks to the pool; a second Ctrl-C
exits immediately.
"""
PARSERS: dict[str, Callable[[str], Any]] = {
    "pool": str,
    "url": str,
    "devices": str,
    "per_device": parse_count,
    "max_tasks": parse_count,
    "idle_timeout": parse_seconds,
    "force_release": parse_bool,
    "experiment": str,
    "tracking.uri": str,
    "lease": parse_seconds,
    "hang_after": parse_seconds,
    "grace": parse_seconds,
    "func": str,
    "end_func": str,
    "table": parse_bool,
    "logs": str,
    "log_level": str,
}


def main(argv: Sequence[str]) -> int:
    """Run the worker; return 0 when it is done, 128 + the signal that stopped it, otherwise 1."""
    arguments = parse_options(argv, PARSERS, "qtorch worker")
    options = worker_options(arguments)
    devices = device_names(arguments.get("devices"))
    devices = [d for d in devices for _ in range(arguments.get("per_device") or 1)]
    # A wrong URL fails here, and soon; the training processes wait longer for their store.
    manager = TaskManager(options.pool, options.url, patience=10.0)
    pool_counts = task_counts_text(manager.task_stat()) or "no tasks yet"
    manager.close()
    level = arguments.get("log_level") or "INFO"
    show_table = arguments.get("table")
    show_table = sys.stdout.isatty() if show_table is None else show_table
    logs = _log_folder(arguments.get("logs"), options.pool if show_table else None)
    configure_process(logging.WARNING if show_table else level)
    os.environ[WORKER_LOG_VARIABLE] = level
    logs_text = f", training output in {logs}" if logs else ""
    print(f"worker {os.getpid()} on {', '.join(devices)}{logs_text}")
    print(f"pool {options.pool} ({pool_counts}) in {redact_urls(manager.url)}", flush=True)
    with _live_table(options.pool, show_table) as show:
        supervisor = Supervisor(options, devices, show=show, logs=logs)
        code = supervisor.run()
    totals = total_counts([slot.display for slot in supervisor.slots])
    print("finished: " + ", ".join(f"{number} {name}" for name, number in totals.items()))
    for error in {str(slot.error) for slot in supervisor.slots if slot.error is not None}:
        print(f"error: {printable_text(redact_urls(error))}", file=sys.stderr)
    return code


def worker_options(arguments: dict[str, Any]) -> WorkerOptions:
    """Convert the command's options to WorkerOptions."""
    pool = require_option(arguments, "pool", "qtorch worker")
    functions = dict(WorkerOptions(pool).functions)
    for name, status in (("func", "waiting"), ("end_func", "part_done")):
        if arguments.get(name):
            functions[status] = arguments[name]
    option_names = (
        "url",
        "lease",
        "max_tasks",
        "idle_timeout",
        "force_release",
        "hang_after",
        "grace",
    )
    options = {name: arguments[name] for name in option_names if arguments.get(name) is not None}
    if options.get("lease") == 0:
        raise ConfigError("lease=0: expected a number of seconds above 0.")
    return WorkerOptions(
        pool,
        functions=functions,
        experiment=arguments.get("experiment"),
        tracking_uri=arguments.get("tracking.uri"),
        **options,
    )


def _log_folder(folder_name: str | None, pool: str | None) -> Path | None:
    """Create the folder for the trainings' output: the given one, or one for a live table."""
    if folder_name is None and pool is None:
        return None
    timestamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = (
        resolve_path(folder_name)
        if folder_name
        else resolve_path(f"outputs/worker_{pool}_{timestamp}_{os.getpid()}")
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _live_table(pool: str, show_table: bool) -> Iterator[Show | None]:
    """Display the live table if requested; yield the function that updates it."""
    if not show_table:
        yield None
        return
    from rich.live import Live

    from qtorch.cli.tables.console import terminal
    from qtorch.cli.tables.tasks import worker_table

    with Live(worker_table(pool, []), console=terminal(), auto_refresh=False) as live:
        yield lambda slots: live.update(worker_table(pool, slots), refresh=True)
