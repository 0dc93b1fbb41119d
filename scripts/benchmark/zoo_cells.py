"""One cell of the zoo's table: train and evaluate a model with a seed, or measure its speed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qtorch.cli.compose import compose_settings, config_path
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context, set_defaults
from qtorch.core.tables import read_csv
from qtorch.metrics import calc_ic
from qtorch.record.signal import ic_figures, raw_label
from qtorch.trainer import TrainerR

SPEED = "speed"
QLIB = "qlib/"
QLIB_NETWORKS = ("lstm", "gru", "alstm", "transformer")
QLIB_SCRIPT = Path(__file__).with_name("zoo_qlib.py")
CONCEPTS = "+dataset.extras.concept={{_target_: qtorch.data.Concepts, table: {}}}"
WARM_UP_DAYS = 90  # calendar days before the train segment, for its first windows

HORIZONS = [f"Ref($close, -{k + 1}) / Ref($close, -1) - 1" for k in (1, 2, 3)]

# Overrides that a network needs because of its paper, its inputs, or the small number of epochs.
VARIANTS: dict[str, tuple[str, ...]] = {
    "mlp": ("dataset=day",),
    "linear": ("dataset=day",),
    # The published penalties are for a hundred times as many rows; here they leave one leaf.
    "lightgbm": ("dataset=day", "model.lambda_l1=2", "model.lambda_l2=6"),
    "double_ensemble": ("dataset=day", "model.lambda_l1=2", "model.lambda_l2=6"),
    "xgboost": ("dataset=day",),
    "catboost": ("dataset=day",),
    "hist": (CONCEPTS,),
    "master": ("dataset.step_len=8",),
    "stockmixer": ("dataset.step_len=16",),
    "tabnet": ("dataset=day", "model.module.pretrain_epochs=2", "model.batch.size=800"),
    "adarnn": ("model.module.pre_epoch=1",),
    "tcts": ("handler.label=[{}]".format(",".join(map(repr, HORIZONS))),),
}


@dataclass(frozen=True)
class Settings:
    """The options that determine the results, and the locations of files."""

    provider: str
    folder: str
    qlib_python: str | None
    threads: int
    steps: int
    universe: str
    instruments: int
    train: tuple[str, str]
    valid: tuple[str, str]
    test: tuple[str, str]
    step_len: int
    epochs: int
    handler: str

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, folder: Path) -> Settings:
        """Create the settings from the command line's arguments."""
        values = {k: v for k, v in vars(args).items() if k in cls.__dataclass_fields__}
        spans = {k: tuple(values[k].split(",")) for k in ("train", "valid", "test")}
        provider = str(Path(args.provider).expanduser().resolve())
        return cls(**{**values, **spans, "provider": provider, "folder": str(folder)})

    @property
    def numbers(self) -> dict[str, Any]:
        """The settings that all results of one table must share, as JSON values."""
        location_fields = ("provider", "folder", "qlib_python", "threads", "steps")
        number_settings = {k: v for k, v in asdict(self).items() if k not in location_fields}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in number_settings.items()}


def find_rows(*, qlib: bool, only: str) -> list[str]:
    """The models of conf/model, and Qlib's own classes with the prefix `qlib/`."""
    choices = sorted(p.stem for p in config_path().joinpath("model").glob("*.yaml"))
    rows = [c for c in choices if c != "lightning"]
    rows += [QLIB + name for name in QLIB_NETWORKS] if qlib else []
    selection = [name for name in only.split(",") if name]
    unknown = set(selection) - set(rows)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(rows)}.")
    return [row for row in rows if not selection or row in selection]


def cell_key(row: str, seed: int | str) -> str:
    """The key of a cell in the results file."""
    return f"{row}:{seed}"


def prepare_worker(settings: Settings) -> None:
    """Initialize a worker process."""
    import torch

    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    set_defaults(tracking_uri=f"sqlite:///{settings.folder}/mlflow.db")
    os.environ["MPLBACKEND"] = "Agg"


def measure(row: str, seed: int | str, settings: Settings) -> dict[str, Any]:
    """Compute the results of a cell."""
    if row.startswith(QLIB):
        return _measure_qlib(row.removeprefix(QLIB), seed, settings)
    return (
        _measure_speed(row, settings)
        if seed == SPEED
        else _measure_quality(row, int(seed), settings)
    )


# -- qtorch ----------------------------------------------------------------------------------------


def build_task(choice: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Compose the task of a model as `qtorch train model=...` does."""
    variant = VARIANTS.get(choice, ())
    overrides = [
        "data=qlib",
        f"data.provider_uri={settings.provider}",
        f"handler={settings.handler}",
        f"model={choice}",
        f"trainer.max_epochs={settings.epochs}",
        "trainer.accelerator=cpu",
        f"seed={seed}",
    ]
    if "dataset=day" not in variant:
        overrides.append(f"dataset.step_len={settings.step_len}")
    if CONCEPTS in variant:
        overrides.append(CONCEPTS.format(_write_concepts(settings)))
    overrides += [override for override in variant if override != CONCEPTS]
    task: dict[str, Any] = compose_settings("train", overrides)["task"]
    dataset = task["dataset"]
    dataset["segments"] = {k: getattr(settings, k) for k in ("train", "valid", "test")}
    dataset["handler"] |= {"instruments": _instrument_names(settings), **_data_span(settings)}
    task["record"] = [r for r in task["record"] if not r["_target_"].endswith("SegmentICRecord")]
    return task


def _measure_quality(choice: str, seed: int, settings: Settings) -> dict[str, Any]:
    (recorder,) = TrainerR("zoo", default_rec_name=choice)([build_task(choice, seed, settings)])
    if recorder.status != "FINISHED":
        raise RuntimeError(recorder.list_tags().get("error", recorder.status))
    metrics, report = recorder.list_metrics(), recorder.load_object("fit_report")
    ic_metrics = {name: metrics[name] for name in ("IC", "ICIR", "Rank IC", "Rank ICIR")}
    rates = {"train_rate": report["samples_per_second"], "parameters": report.get("parameters")}
    summary = {k: report.get(k) for k in ("epochs", "best_epoch", "seconds", "samples")}
    return {**ic_metrics, **rates, **summary, "run": recorder.id}


def _measure_speed(choice: str, settings: Settings) -> dict[str, Any]:
    """Samples per second of a short training and of a prediction, each after a warm-up."""
    task = build_task(choice, 0, settings)
    config = task["model"]
    dataset = init_instance_by_config(task["dataset"])
    if "trainer" in config:
        config = {
            **config,
            "early_stop": None,
            "monitor": "train/loss",
            "checkpoint": {"enabled": False},
            "trainer": {
                **config["trainer"],
                "max_epochs": 2,
                "limit_train_batches": settings.steps,
                "limit_val_batches": 0,
                "enable_progress_bar": False,
            },
        }
    model = init_instance_by_config(config)
    with session_context(seed=0):
        model.fit(dataset)
    report = model.fit_report_
    model.predict(dataset)
    start = time.perf_counter()
    scores = model.predict(dataset)
    seconds = time.perf_counter() - start
    return {
        "train_rate": report["samples_per_second"],
        "predict_rate": len(scores) / seconds,
        "parameters": report.get("parameters"),
    }


# -- Qlib ------------------------------------------------------------------------------------------


def write_qlib_job(network: str, seed: int | str, settings: Settings) -> Path:
    """Write the job file for `zoo_qlib.py`, and return its path.

    The job has the same instruments, days, features, processors and hyperparameters as the task
    of qtorch.
    """
    task = build_task(network, 0, settings)
    handler, model = task["dataset"]["handler"], task["model"]
    path = Path(settings.folder) / f"qlib-{network}-{seed}.json"
    job = {
        "network": network,
        "provider": settings.provider,
        "arguments": model["network"],
        "lr": model["optimizer"]["lr"],
        "weight_decay": model["optimizer"].get("weight_decay", 0.0),
        "batch_size": model["batch"]["size"],
        "patience": model["early_stop"]["patience"],
        "epochs": settings.epochs,
        "seed": 0 if seed == SPEED else seed,
        "steps": settings.steps if seed == SPEED else None,
        "threads": settings.threads,
        "step_len": settings.step_len,
        "segments": task["dataset"]["segments"],
        "instruments": handler["instruments"],
        **_data_span(settings),
        "columns": handler["infer_processors"][0]["col_list"],
        "work": str(path.with_suffix("")),
    }
    path.write_text(json.dumps(job))
    return path


def _measure_qlib(network: str, seed: int | str, settings: Settings) -> dict[str, Any]:
    path = write_qlib_job(network, seed, settings)
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    command = [str(settings.qlib_python), str(QLIB_SCRIPT), str(path)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    cell: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    if seed == SPEED:
        return cell
    scores = read_csv(path.with_suffix(".csv"), ["instrument"])
    scores["datetime"] = pd.to_datetime(scores["datetime"])
    scores = scores.set_index(["datetime", "instrument"])["score"]
    label = _load_label(settings)
    if len(scores.index.intersection(label.index)) < 0.99 * len(scores):
        raise RuntimeError("Qlib's scores and the labels are not for the same samples")
    return {**ic_figures(*calc_ic(scores, label)), **cell}


@cache
def _load_label(settings: Settings) -> pd.Series:
    dataset = init_instance_by_config(build_task("lstm", 0, settings)["dataset"])
    return raw_label(dataset).iloc[:, 0]


# -- data ------------------------------------------------------------------------------------------


@cache
def _open_source(settings: Settings) -> Any:
    source = {"_target_": "qtorch.data.QlibSource", "provider_uri": settings.provider}
    return init_instance_by_config(source)


@cache
def _instrument_names(settings: Settings) -> list[str]:
    return list(_open_source(settings).instruments(settings.universe))[: settings.instruments]


def _data_span(settings: Settings) -> dict[str, str]:
    first = pd.Timestamp(settings.train[0]) - pd.Timedelta(days=WARM_UP_DAYS)
    # The last label needs the prices of the two following days.
    last = pd.Timestamp(settings.test[1]) + pd.Timedelta(days=7)
    return {"start_time": f"{first:%Y-%m-%d}", "end_time": f"{last:%Y-%m-%d}"}


def _write_concepts(settings: Settings) -> Path:
    """Write artificial concept memberships for networks that need some; return the file's path.

    The data have no industries, so the instruments are divided into eight groups by the signs of
    their loadings on the first three principal components of the returns in the year before the
    train segment.
    """
    path = Path(settings.folder) / "concepts.parquet"
    if path.exists():
        return path
    last = pd.Timestamp(settings.train[0]) - pd.Timedelta(days=1)
    panel = _open_source(settings).load(
        ["close"],
        instruments=_instrument_names(settings),
        start_time=f"{last - pd.DateOffset(years=1):%Y-%m-%d}",
        end_time=f"{last:%Y-%m-%d}",
    )
    close = pd.DataFrame(panel.column("close").numpy(), columns=list(panel.instruments)).ffill()
    returns = close.pct_change(fill_method=None).fillna(0.0)
    returns = returns.sub(returns.mean(axis=1), axis=0)
    loadings = np.linalg.svd(returns.to_numpy(), full_matrices=False)[2][:3]  # [3, N]
    group = (loadings > np.median(loadings, axis=1, keepdims=True)).T @ np.array([1, 2, 4])
    frame = pd.DataFrame({"instrument": returns.columns, "concept": [f"G{g}" for g in group]})
    temporary = path.with_suffix(f".{os.getpid()}")
    frame.to_parquet(temporary)
    temporary.replace(path)
    return path
