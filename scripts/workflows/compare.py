"""Run the same workflow files by `qrun` of real Qlib and by `qtorch run`, and compare them.

    python scripts/workflows/compare.py FOLDER --qlib-python PYTHON [NAME ...]

PYTHON has pyqlib. Both take turns on a made-up market of Qlib's layout in FOLDER, one process each,
with one thread. The first table compares the IC of the scores (deep models: over some seeds) and
the portfolio's figures that qtorch (`as_qlib=True`) computes from Qlib's own scores; the second one
the shortest times of the whole commands: by the clock, and of the processor, which other programs
on the machine disturb less. Runs that FOLDER has already are not repeated. Where Qlib holds more
stocks than topk (a fault), its portfolio differs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlib_workflows import build_workflow, write_market

import qtorch
from qtorch import R
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.translation import translate_config
from qtorch.record import PortAnaRecord

ROOT = Path(__file__).resolve().parents[2]
DEEP = ("LSTM-158", "GRU-158", "ALSTM-158", "MLP-158")
CLOSED = ("LightGBM-158", "Linear-158")
# The preparation of the data takes nearly all of their time; the second has the processors that
# Qlib's Alpha360 has if none are named.
DEFAULTS = "-defaults"
TIMED = ("Linear-360", f"Linear-360{DEFAULTS}")
SEGMENTS = {
    "train": ["2008-01-01", "2010-12-31"],
    "valid": ["2011-01-01", "2011-12-31"],
    "test": ["2012-01-01", "2013-12-31"],
}
LABELS_END = "2014-01-31"  # the labels of the last test days need later bars
PORTFOLIO = ("annualized_return", "information_ratio", "max_drawdown", "mean", "std")
SIDES = ("qlib", "qtorch")


def write_workflow(name: str, side: str, seed: int | None, options: argparse.Namespace) -> Path:
    """Write a workflow file whose runs are stored in a database of its side."""
    benchmark = name.removesuffix(DEFAULTS)
    workflow = build_workflow(f"{benchmark}-csi300", str(options.folder / "cn_data"))
    uri = f"sqlite:///{options.folder}/{side}.db"
    manager = {"class": "MLflowExpManager", "module_path": "qlib.workflow.expm"}
    manager["kwargs"] = {"uri": uri, "default_exp_name": "workflow"}
    workflow["qlib_init"] |= {"kernels": 1, "exp_manager": manager}
    workflow["experiment_name"] = experiment_name(name, seed)
    task = workflow["task"]
    task["model"]["kwargs"] = model_arguments(benchmark, seed, options)
    dataset = task["dataset"]["kwargs"]
    dataset["segments"] = SEGMENTS
    handler = dataset["handler"]["kwargs"]
    handler |= {"end_time": LABELS_END, "fit_end_time": SEGMENTS["train"][1]}
    if name.endswith(DEFAULTS):
        del handler["infer_processors"], handler["learn_processors"]
    portfolio = task["record"][2]["kwargs"]["config"]
    portfolio["backtest"] |= dict(zip(("start_time", "end_time"), SEGMENTS["test"], strict=True))
    portfolio["strategy"]["kwargs"] |= {"topk": 10, "n_drop": 2}
    path = Path(options.folder / f"{side}-{workflow['experiment_name']}.yaml")
    path.write_text(yaml.safe_dump(workflow, sort_keys=False))
    return path


def experiment_name(name: str, seed: int | None) -> str:
    """Return the name of an experiment, which has one run."""
    return name if seed is None else f"{name}-{seed}"


def model_arguments(name: str, seed: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the benchmarks, with fewer epochs and without other processes."""
    workflow = build_workflow(f"{name}-csi300", "")
    arguments = dict(workflow["task"]["model"]["kwargs"])
    if "n_jobs" in arguments:
        arguments["n_jobs"] = 0
    if "num_threads" in arguments:
        arguments["num_threads"] = 1
    if seed is not None:
        arguments["seed"] = seed
    if name.startswith("MLP"):
        # Qlib's own scheduler does not run with this version of torch.
        steps = {"max_steps": 200 * options.epochs, "eval_steps": 50, "batch_size": 2000}
        return {**arguments, **steps, "scheduler": None}
    return {**arguments, "n_epochs": options.epochs} if "n_epochs" in arguments else arguments


def run_workflow(
    name: str, side: str, seed: int | None, options: argparse.Namespace
) -> dict[str, float]:
    """Run a workflow file by one of the commands; return its seconds and the processor's."""
    path = write_workflow(name, side, seed, options)
    commands = {
        "qlib": [options.qlib_python, "-m", "qlib.cli.run", str(path)],
        "qtorch": [sys.executable, "-m", "qtorch", "run", str(path)],
    }
    variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start, processor_start = time.perf_counter(), processor_seconds()
    process = subprocess.run(
        commands[side],
        cwd=options.folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    seconds = {
        "seconds": time.perf_counter() - start,
        "processor": processor_seconds() - processor_start,
    }
    if process.returncode:
        raise SystemExit(f"{' '.join(commands[side])} failed:\n{process.stderr[-4000:]}")
    return seconds


def processor_seconds() -> float:
    """Return the processor time of all child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_run(name: str, side: str, seed: int | None, folder: Path) -> dict[str, Any]:
    """Return the metrics and scores of a run."""
    client = MlflowClient(f"sqlite:///{folder}/{side}.db")
    experiment = client.get_experiment_by_name(experiment_name(name, seed))
    run = client.search_runs([experiment.experiment_id])[0]
    if side == "qtorch":
        return {"metrics": run.data.metrics, "scores": None}
    path = client.download_artifacts(run.info.run_id, "pred.pkl")
    return {"metrics": run.data.metrics, "scores": pd.read_pickle(path)}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run what is missing, both sides in turn; return the results by name and side."""
    stored = options.folder / "results.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in options.names:
        sides = results.setdefault(name, {side: [] for side in SIDES})
        for k in range(len(sides["qtorch"]), options.seeds if name in DEEP else 1):
            seed = k if name in DEEP else None
            for side in SIDES:
                seconds = run_workflow(name, side, seed, options)
                run = read_run(name, side, seed, options.folder)
                sides[side].append({**seconds, "metrics": run["metrics"]})
                print(name, seed, side, {k: round(v, 1) for k, v in seconds.items()}, flush=True)
            stored.write_text(json.dumps(results))
    return results


def portfolio_difference(name: str, options: argparse.Namespace) -> float:
    """Return the largest difference of the portfolio's figures from the same scores of Qlib's."""
    seed = 0 if name in DEEP else None
    run = read_run(name, "qlib", seed, options.folder)
    workflow = yaml.safe_load(write_workflow(name, "qlib", seed, options).read_text())
    config = translate_config(workflow["task"]["record"][2], Notes())["config"]
    config["backtest"] = {**config["backtest"], "as_qlib": True}
    qtorch.init(
        provider_uri=str(options.folder / "cn_data"),
        region="cn",
        tracking_uri=f"sqlite:///{options.folder}/same_scores.db",
    )
    with R.start(experiment_name=experiment_name(name, seed)):
        recorder = R.get_recorder()
        recorder.save_objects(**{"pred.pkl": run["scores"]})
        PortAnaRecord(recorder, config, region="cn").generate()
        metrics = recorder.list_metrics()
    names = [f"1day.excess_return_{c}_cost.{n}" for c in ("with", "without") for n in PORTFOLIO]
    return max(abs(metrics[n] - run["metrics"][n]) for n in names)


def format_mean(values: list[float]) -> str:
    """Return the mean, with the standard deviation of several values."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.5f}"


def print_tables(results: dict[str, Any], options: argparse.Namespace) -> bool:
    """Print both tables; return whether the results agree."""
    is_close = True
    print(
        "\n| workflow | IC, Qlib | IC, qtorch | portfolio from the same scores |\n|---|---|---|---|"
    )
    for name in (n for n in options.names if n not in TIMED):
        values = {s: [r["metrics"]["IC"] for r in results[name][s]] for s in SIDES}
        difference = abs(statistics.fmean(values["qlib"]) - statistics.fmean(values["qtorch"]))
        limit = 1e-3
        if name in DEEP:
            spread = [statistics.variance(v) if len(v) > 1 else np.inf for v in values.values()]
            limit = 2 * (sum(spread) / len(values["qlib"])) ** 0.5
        portfolio = portfolio_difference(name, options)
        is_close &= difference <= max(limit, 1e-3) and portfolio < 1e-6
        cells = [name, *(format_mean(values[side]) for side in SIDES), f"within {portfolio:.0e}"]
        print(f"| {' | '.join(cells)} |")
    print("\n| workflow | seconds, Qlib | qtorch | ratio | processor, Qlib | qtorch | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in options.names:
        cells = [name]
        for clock in ("seconds", "processor"):
            qlib, own = (min(r[clock] for r in results[name][side]) for side in SIDES)
            cells += [f"{qlib:.1f}", f"{own:.1f}", f"{qlib / own:.1f}"]
        print(f"| {' | '.join(cells)} |")
    return is_close


def main() -> int:
    """Run, compare and print; return 1 if results differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("names", nargs="*", default=[*DEEP, *CLOSED, *TIMED])
    parser.add_argument("--qlib-python", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--instruments", type=int, default=60)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "cn_data").is_dir():
        write_market(options.folder, num_instruments=options.instruments)
    return int(not print_tables(measure(options), options))


if __name__ == "__main__":
    sys.exit(main())
