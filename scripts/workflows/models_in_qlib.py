"""Train qtorch's models inside real Qlib: `class: LightningModel` in workflow files for `qrun`.

    PYTHON scripts/workflows/models_in_qlib.py FOLDER [--epochs 1]

PYTHON has pyqlib and qtorch. Writes a small market and two workflow files into FOLDER (an LSTM on
windows of Alpha158, a GRU on the columns of Alpha360), runs them by the function of `qrun`, and
trains one again with a reweighter. Then another process loads each model from Qlib's recorder and
repeats its predictions. Prints one line for each; the exit code is 1 if a result is missing or
differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import qlib
import yaml
from qlib.cli.run import workflow as qrun
from qlib.data.dataset.weight import Reweighter
from qlib.model.trainer import task_train
from qlib.utils import init_instance_by_config
from qlib.workflow import R

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlib_workflows import build_workflow as build_benchmark
from qlib_workflows import write_market

EXPERIMENT = "qtorch in qlib"
SPANS = {
    "train": ["2008-01-01", "2008-12-31"],
    "valid": ["2009-01-01", "2009-06-30"],
    "test": ["2009-07-01", "2009-12-31"],
}
NETWORKS: dict[str, dict[str, Any]] = {
    "LSTM-158-csi300": {"class": "LSTM", "kwargs": {"hidden_size": 16, "num_layers": 1}},
    "GRU-360-csi300": {"class": "GRU", "kwargs": {"d_feat": 6, "hidden_size": 16, "num_layers": 1}},
}
METRICS = ("IC", "Rank IC", "1day.excess_return_with_cost.annualized_return")


def build_workflow(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Return a workflow of Qlib's benchmarks with one of our models."""
    workflow = build_benchmark(name, str(folder / "cn_data"))
    workflow["qlib_init"] |= {"kernels": 1, "exp_manager": manager_config(folder)}
    workflow["experiment_name"] = EXPERIMENT
    task = workflow["task"]
    task["model"] = model_config(name, epochs)
    dataset = task["dataset"]["kwargs"]
    dataset["segments"] = SPANS
    handler = dataset["handler"]["kwargs"]
    handler |= {"end_time": "2010-01-29", "fit_end_time": SPANS["train"][1]}
    portfolio = task["record"][2]["kwargs"]["config"]
    portfolio["backtest"] |= dict(zip(("start_time", "end_time"), SPANS["test"], strict=True))
    portfolio["strategy"]["kwargs"] |= {"topk": 6, "n_drop": 2}
    return workflow


def model_config(name: str, epochs: int) -> dict[str, Any]:
    """Return our model as a part of Qlib's task."""
    network = {"module_path": "qtorch.nn", **NETWORKS[name]}
    trainer = {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
    return {
        "class": "LightningModel",
        "module_path": "qtorch.model",
        "kwargs": {"network": network, "batch": {"size": 512}, "trainer": trainer, "seed": 0},
    }


def manager_config(folder: Path) -> dict[str, Any]:
    """Return Qlib's experiment manager with a database: MLflow has no stores of files any more."""
    return {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": f"sqlite:///{folder}/runs.db", "default_exp_name": EXPERIMENT},
    }


class LastHalf(Reweighter):
    """Weigh the first half of the samples 0."""

    def __init__(self) -> None:
        self.num_samples: list[int] = []

    def reweight(self, data: Any) -> Any:
        """Return the weights of all samples."""
        self.num_samples.append(len(data))
        return np.arange(len(data)) >= len(data) / 2


def init_qlib(folder: Path) -> None:
    """Open the market and the runs of FOLDER in this process."""
    qlib.init(
        provider_uri=str(folder / "cn_data"),
        region="cn",
        kernels=1,
        logging_level=30,
        exp_manager=manager_config(folder),
    )


def train_with_reweighter(folder: Path) -> dict[str, Any]:
    """Train by Qlib's task_train with a Reweighter of Qlib's; return how much it changed."""
    name = "GRU-360-csi300"
    task = build_workflow(name, folder, 1)["task"]
    task["record"] = task["record"][:1]
    reweighter = LastHalf()
    run = task_train({**task, "reweighter": reweighter}, experiment_name="reweighter")
    runs = R.list_recorders(experiment_name=EXPERIMENT).values()
    unweighted = next(r for r in runs if network_name(r) == NETWORKS[name]["class"])
    scores, other_scores = (r.load_object("pred.pkl")["score"] for r in (run, unweighted))
    return {
        "network": network_name(run),
        "reweighter": type(reweighter).__name__,
        "num_samples": reweighter.num_samples,
        "change_of_scores": float(np.abs(scores - other_scores).max()),
    }


def network_name(recorder: Any) -> str:
    """Return the class of the network of a run."""
    return str(recorder.load_object("task")["model"]["kwargs"]["network"]["class"])


def check_runs(folder: Path) -> list[dict[str, Any]]:
    """Return for each run of Qlib's its metrics, and whether its model predicts the same again."""
    init_qlib(folder)
    results = []
    for recorder in R.list_recorders(experiment_name=EXPERIMENT).values():
        model = recorder.load_object("params.pkl")
        dataset = init_instance_by_config(recorder.load_object("task")["dataset"])
        scores, stored_scores = model.predict(dataset), recorder.load_object("pred.pkl")["score"]
        metrics = recorder.list_metrics()
        report = recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
        result = {
            "network": network_name(recorder),
            "model": f"{type(model).__module__}.{type(model).__name__}",
            "num_scores": len(stored_scores),
            "is_same_index": bool(scores.index.equals(stored_scores.index)),
            "difference": float(np.abs(scores - stored_scores).max()),
            "num_days": len(report),
            **{name: metrics[name] for name in METRICS},
        }
        results.append(result)
    return results


def main() -> int:
    """Run everything; return 1 if a prediction differs or the weights had no effect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="only check the runs of FOLDER")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.check:
        print("\n".join(json.dumps(result) for result in check_runs(folder)))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    write_market(folder, num_instruments=12)
    for name in NETWORKS:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(build_workflow(name, folder, options.epochs)))
        qrun(str(path))
    weighted = train_with_reweighter(folder)
    command = [sys.executable, __file__, str(folder), "--check"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    print("\n".join([*lines, json.dumps(weighted)]))
    results = [json.loads(line) for line in lines]
    is_same = [r["is_same_index"] and r["difference"] == 0 for r in results]
    return int(len(is_same) < len(NETWORKS) or not all(is_same) or not weighted["change_of_scores"])


if __name__ == "__main__":
    sys.exit(main())
