"""The whole zoo on real data: every network of conf/model, the baselines, Qlib's own classes.

    python scripts/zoo.py --provider FOLDER --work DIR [--only lstm,gru] [--processes 2]
    python scripts/zoo.py --provider FOLDER --work DIR --speed      # alone on a quiet machine
    python scripts/zoo.py --provider FOLDER --work DIR --table      # what there is so far

FOLDER holds bars in Qlib's layout. Networks are found in conf/model. Each (model, seed) is a run
of its own in MLflow (DIR/mlflow.db) and a cell of DIR/zoo.json: a second start does what is
missing. Qlib's rows need --qlib-python, a Python with pyqlib. Prints a table in Markdown.
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

from qtorch.core.files import whole_file

FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")


class Results:
    """The finished cells, in a file that is whole at every moment."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            held = json.loads(path.read_text())
            other = {k for k, v in settings.items() if held["settings"].get(k) != v}
            if other:
                told = ", ".join(f"{k}={held['settings'].get(k)}" for k in sorted(other))
                raise SystemExit(f"{path} was made with {told}; give the same, or another --work.")
            self.cells = held["cells"]
        self.settings = settings

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Keep a cell, and write all."""
        self.cells[key] = cell
        with whole_file(self.path) as temporary:
            text = {"settings": self.settings, "cells": self.cells}
            temporary.write_text(json.dumps(text, indent=1))


def missing_cells(args: argparse.Namespace, results: Results) -> list[tuple[str, int | str]]:
    rows = find_rows(qlib=args.qlib_python is not None, only=args.only)
    seeds = [SPEED] if args.speed else [int(s) for s in args.seeds.split(",")]
    # Qlib's take longest: first, so that no process ends alone with them.
    rows.sort(key=lambda row: not row.startswith(QLIB))
    wanted = [(row, seed) for seed in seeds for row in rows]
    return [cell for cell in wanted if cell_key(*cell) not in results.cells]


def run_cell(job: tuple[str, int | str, Settings]) -> tuple[str, dict[str, Any]]:
    """One cell in a worker; an error is a result too."""
    row, seed, settings = job
    begin, cpu = time.perf_counter(), cpu_seconds()
    try:
        cell = zoo_cells.measure(row, seed, settings)
    except Exception as error:
        traceback.print_exc()
        return cell_key(row, seed), {"error": f"{type(error).__name__}: {error}"}
    spent = {"cell_seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds() - cpu}
    return cell_key(row, seed), {**cell, **spent}


def cpu_seconds() -> float:
    """Of this process and of those it waited for: what a busy machine does not change."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def work_off(args: argparse.Namespace, results: Results, settings: Settings) -> list[str]:
    """Run what is missing; the keys of what failed."""
    jobs = [(*cell, settings) for cell in missing_cells(args, results)]
    failed = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(
        min(args.processes, max(len(jobs), 1)), zoo_cells.prepare, (settings,)
    ) as pool:
        for number, (key, cell) in enumerate(pool.imap_unordered(run_cell, jobs), 1):
            if "error" in cell:
                failed.append(key)
                told = cell["error"]
            else:
                results.add(key, cell)
                told = f"Rank IC {cell['Rank IC']:.4f}" if "Rank IC" in cell else ""
                told += f" in {cell['cell_seconds']:.0f} s, {cell['cpu_seconds']:.0f} of the CPU"
            print(f"{number}/{len(jobs)} {key} {told}", file=sys.stderr, flush=True)
    return failed


def spread(values: list[float], digits: int) -> str:
    """Mean and deviation over the seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def print_table(results: Results) -> None:
    """One row a model, in Markdown; speeds of `--speed` where it was run."""
    by_row: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in results.cells.items():
        row, _, seed = key.partition(":")
        by_row.setdefault(row, {})[seed] = cell
    head = ("network", *FIGURES, "parameters", "train /s", "predict /s", "seeds")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in sorted(by_row, key=lambda r: (r.startswith(QLIB), r)):
        cells = by_row[row]
        seeds = [c for s, c in cells.items() if s != SPEED]
        first = next(iter(cells.values()))
        speeds = cells.get(SPEED) or (seeds[0] if seeds else {})
        shown = [spread([c[f] for c in seeds], 4) if seeds else "" for f in FIGURES]
        counts = [first.get("parameters"), speeds.get("train_rate"), speeds.get("predict_rate")]
        shown += ["" if v is None else f"{v:,.0f}" for v in counts]
        print("| " + " | ".join((row, *shown, str(len(seeds)))) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", required=True)
    parser.add_argument("--work", required=True, help="a folder for runs and results")
    parser.add_argument("--qlib-python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument("--only", default="", help="models by comma; qlib/lstm is Qlib's own")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--universe", default="nyse500")
    parser.add_argument("--instruments", type=int, default=100, help="the first of the universe")
    parser.add_argument("--train", default="2013-01-01,2014-12-31")
    parser.add_argument("--valid", default="2015-01-01,2015-12-31")
    parser.add_argument("--test", default="2016-01-01,2017-11-30")
    parser.add_argument("--step-len", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--handler", default="alpha158_20")
    parser.add_argument("--speed", action="store_true", help="short trainings, for samples/s alone")
    parser.add_argument("--steps", type=int, default=30, help="training steps of --speed")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    args = parser.parse_args()
    folder = Path(args.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings.of(args, folder)
    results = Results(folder / "zoo.json", settings.numbers)
    failed = [] if args.table else work_off(args, results, settings)
    print_table(results)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
