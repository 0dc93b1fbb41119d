"""Train every model of conf/model and Qlib's own classes on real data, and print a table.

    python scripts/zoo.py --provider FOLDER --work DIR [--only lstm,gru] [--processes 2]
    python scripts/zoo.py --provider FOLDER --work DIR --speed      # needs an idle machine
    python scripts/zoo.py --provider FOLDER --work DIR --table      # print the results so far

FOLDER holds bars in Qlib's layout. Each (model, seed) is a run of its own in MLflow
(DIR/mlflow.db) and a cell of DIR/zoo.json; a second start only trains missing cells. Qlib's rows
need --qlib-python, a Python interpreter with pyqlib. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))
import zoo_cells
from zoo_cells import QLIB, SPEED, Settings, cell_key, find_rows

from qtorch.core.files import atomic_write

METRICS = ("IC", "ICIR", "Rank IC", "Rank ICIR")


class Results:
    """The finished cells, stored in a file that is replaced atomically."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            differing = {k for k, v in settings.items() if content["settings"].get(k) != v}
            if differing:
                text = ", ".join(f"{k}={content['settings'].get(k)}" for k in sorted(differing))
                raise SystemExit(
                    f"{path} was created with {text}; use the same options, or another --work."
                )
            self.cells = content["cells"]
        self.settings = settings

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Add a cell and save all cells."""
        self.cells[key] = cell
        with atomic_write(self.path) as temporary:
            text = {"settings": self.settings, "cells": self.cells}
            temporary.write_text(json.dumps(text, indent=1))


def missing_cells(args: argparse.Namespace, results: Results) -> list[tuple[str, int | str]]:
    rows = find_rows(qlib=args.qlib_python is not None, only=args.only)
    seeds = [SPEED] if args.speed else [int(s) for s in args.seeds.split(",")]
    # Qlib's models take longest, so they start first to keep all processes busy until the end.
    rows.sort(key=lambda row: not row.startswith(QLIB))
    all_cells = [(row, seed) for seed in seeds for row in rows]
    return [cell for cell in all_cells if cell_key(*cell) not in results.cells]


def run_cell(job: tuple[str, int | str, Settings]) -> tuple[str, dict[str, Any]]:
    """Compute one cell in a worker process; an error is returned as the cell."""
    row, seed, settings = job
    start, start_cpu = time.perf_counter(), cpu_seconds()
    try:
        cell = zoo_cells.measure(row, seed, settings)
    except Exception as error:
        traceback.print_exc()
        return cell_key(row, seed), {"error": f"{type(error).__name__}: {error}"}
    times = {"cell_seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - start_cpu}
    return cell_key(row, seed), {**cell, **times}


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children, independent of other load."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_missing_cells(args: argparse.Namespace, results: Results, settings: Settings) -> list[str]:
    """Compute the missing cells, and return the keys of those that failed."""
    jobs = [(*cell, settings) for cell in missing_cells(args, results)]
    failed_keys = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(
        min(args.processes, max(len(jobs), 1)), zoo_cells.prepare_worker, (settings,)
    ) as pool:
        for number, (key, cell) in enumerate(pool.imap_unordered(run_cell, jobs), 1):
            if "error" in cell:
                failed_keys.append(key)
                text = cell["error"]
            else:
                results.add(key, cell)
                text = f"Rank IC {cell['Rank IC']:.4f}" if "Rank IC" in cell else ""
                text += f" in {cell['cell_seconds']:.0f} s, {cell['cpu_seconds']:.0f} of the CPU"
            print(f"{number}/{len(jobs)} {key} {text}", file=sys.stderr, flush=True)
    return failed_keys


def format_mean_std(values: list[float], digits: int) -> str:
    """Format mean and standard deviation over the seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def print_table(results: Results) -> None:
    """Print a Markdown table with one row per model; the speeds are those of `--speed` if run."""
    by_row: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in results.cells.items():
        row, _, seed = key.partition(":")
        by_row.setdefault(row, {})[seed] = cell
    head = ("network", *METRICS, "parameters", "train /s", "predict /s", "seeds")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in sorted(by_row, key=lambda r: (r.startswith(QLIB), r)):
        cells = by_row[row]
        seeds = [c for s, c in cells.items() if s != SPEED]
        first = next(iter(cells.values()))
        speeds = cells.get(SPEED) or (seeds[0] if seeds else {})
        columns = [format_mean_std([c[f] for c in seeds], 4) if seeds else "" for f in METRICS]
        counts = [first.get("parameters"), speeds.get("train_rate"), speeds.get("predict_rate")]
        columns += ["" if v is None else f"{v:,.0f}" for v in counts]
        print("| " + " | ".join((row, *columns, str(len(seeds)))) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", required=True)
    parser.add_argument("--work", required=True, help="a folder for runs and results")
    parser.add_argument("--qlib-python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument(
        "--only", default="", help="models, separated by commas; qlib/lstm is Qlib's class"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--universe", default="nyse500")
    parser.add_argument(
        "--instruments", type=int, default=100, help="use the first N of the universe"
    )
    parser.add_argument("--train", default="2013-01-01,2014-12-31")
    parser.add_argument("--valid", default="2015-01-01,2015-12-31")
    parser.add_argument("--test", default="2016-01-01,2017-11-30")
    parser.add_argument("--step-len", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--handler", default="alpha158_20")
    parser.add_argument(
        "--speed", action="store_true", help="short trainings that only measure samples/s"
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps of --speed")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    args = parser.parse_args()
    folder = Path(args.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings.from_arguments(args, folder)
    results = Results(folder / "zoo.json", settings.numbers)
    failed_keys = [] if args.table else run_missing_cells(args, results, settings)
    print_table(results)
    if failed_keys:
        print(f"failed: {', '.join(failed_keys)}", file=sys.stderr)
    return int(bool(failed_keys))


if __name__ == "__main__":
    sys.exit(main())
