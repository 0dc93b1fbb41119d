"""Small models of every network of conf/model, and toy datasets for them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))

from toy_training import ToyDataset

from qtorch.cli.compose import compose_settings, config_path
from qtorch.model import methods
from qtorch.model.loop.module import ScoreModule

NOT_NETWORKS = {"lightning", "lightgbm", "linear", "xgboost", "catboost", "double_ensemble"}
FLAT_NETWORKS = {"mlp", "tabnet"}
STEP_LEN = {"master": 8, "stockmixer": 16}
NUM_DAYS = 26
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "adarnn": {"module": {"pre_epoch": 1}},
    "tabnet": {"module": {"pretrain_epochs": 1}, "network": {"vbs": 50}},
}


def network_names() -> list[str]:
    names = {path.stem for path in (config_path() / "model").glob("*.yaml")}
    return sorted(names - NOT_NETWORKS)


def is_day_network(config: dict[str, Any]) -> bool:
    return str(config["batch"]["order"]).startswith("day")


def network_config(name: str, *overrides: str, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a small model for the toy dataset."""
    config: dict[str, Any] = compose_settings("train", [f"model={name}", *overrides])["model"]
    config["trainer"] = {
        "max_epochs": 2,
        "accelerator": "auto",
        "enable_progress_bar": False,
        "deterministic": True,
        "gradient_clip_val": 3.0,
        "gradient_clip_algorithm": "value",
        **trainer,
    }
    # One network shows what a checkpoint waits for.
    config |= {"checkpoint": {"enabled": name == "lstm"}, "seed": 0, "early_stop": None}
    sizes = {"eval_size": 80} if is_day_network(config) else {"size": 100, "eval_size": 200}
    config["batch"] |= sizes
    for group, changes in CHANGES.get(name, {}).items():
        config[group] |= changes
    return config


def network_dataset(name: str, num_days: int = NUM_DAYS, num_instruments: int = 40) -> ToyDataset:
    """Return a toy dataset with windows, labels and extra tensors that the network needs."""
    return ToyDataset(
        num_days,
        num_instruments,
        step_len=1 if name in FLAT_NETWORKS else STEP_LEN.get(name, 20),
        num_labels=2 if name == "tcts" else 1,
        num_features=20,
        missing=0.01,
        concepts=name == "hist",
    )


def training_modules() -> list[type[ScoreModule]]:
    """Return ScoreModule and every class of the package that derives from it."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    classes = [ScoreModule]
    for module_class in classes:
        classes += module_class.__subclasses__()
    return classes
