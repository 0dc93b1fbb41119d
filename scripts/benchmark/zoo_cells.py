"""One cell of the zoo's table: a model and a seed, trained and judged; or its speed alone."""

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

from qtorch.cli.compose import composed
from qtorch.cli.config_path import config_path
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import init, session_context
from qtorch.metrics import calc_ic
from qtorch.record.segment_ic import raw_label
from qtorch.record.signal_analysis import ic_figures
from qtorch.trainer import TrainerR

SPEED = "speed"
QLIB = "qlib/"
QLIB_NETWORKS = ("lstm", "gru", "alstm", "transformer")
SIDE = Path(__file__).with_name("zoo_qlib.py")
CONCEPTS = "+dataset.extras.concept={{_target_: qtorch.data.Concepts, table: {}}}"
WARM_UP_DAYS = 90  # calendar days before the train segment, for its first windows

HORIZONS = [f"Ref($close, -{k + 1}) / Ref($close, -1) - 1" for k in (1, 2, 3)]

# What a network's own paper or its form asks of the dataset, and of a few epochs.
VARIANTS: dict[str, tuple[str, ...]] = {
    "mlp": ("dataset=day",),
    "linear": ("dataset=day",),
    # The published penalties are for a hundred times as many rows; of few they leave one leaf.
    "lightgbm": ("dataset=day", "model.lambda_l1=2", "model.lambda_l2=6"),
    "hist": (CONCEPTS,),
    "master": ("dataset.step_len=8",),
    "stockmixer": ("dataset.step_len=16",),
    "tabnet": ("dataset=day", "model.module.pretrain_epochs=2", "model.batch.size=800"),
    "adarnn": ("model.module.pre_epoch=1",),
    "tcts": ("handler.label=[{}]".format(",".join(map(repr, HORIZONS))),),
}


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, and where things lie."""

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
    def of(cls, args: argparse.Namespace, folder: Path) -> Settings:
        """From the command line."""
        given = {k: v for k, v in vars(args).items() if k in cls.__dataclass_fields__}
        spans = {k: tuple(given[k].split(",")) for k in ("train", "valid", "test")}
        provider = str(Path(args.provider).expanduser().resolve())
        return cls(**{**given, **spans, "provider": provider, "folder": str(folder)})

    @property
    def numbers(self) -> dict[str, Any]:
        """What results of one table have in common, as JSON has it."""
        places = ("provider", "folder", "qlib_python", "threads", "steps")
        kept = {k: v for k, v in asdict(self).items() if k not in places}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def find_rows(*, qlib: bool, only: str) -> list[str]:
    """The models of conf/model, and Qlib's own classes behind `qlib/`."""
    choices = sorted(p.stem for p in config_path().joinpath("model").glob("*.yaml"))
    rows = [c for c in choices if c != "lightning"]
    rows += [QLIB + name for name in QLIB_NETWORKS] if qlib else []
    wanted = [name for name in only.split(",") if name]
    unknown = set(wanted) - set(rows)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(rows)}.")
    return [row for row in rows if not wanted or row in wanted]


def cell_key(row: str, seed: int | str) -> str:
    """The name of a cell."""
    return f"{row}:{seed}"


def prepare(settings: Settings) -> None:
    """A worker's own state."""
    import torch

    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    init(tracking_uri=f"sqlite:///{settings.folder}/mlflow.db")
    os.environ["MPLBACKEND"] = "Agg"


def measure(row: str, seed: int | str, settings: Settings) -> dict[str, Any]:
    """The figures of a cell."""
    if row.startswith(QLIB):
        return _qlib(row.removeprefix(QLIB), seed, settings)
    return _speed(row, settings) if seed == SPEED else _quality(row, int(seed), settings)


# -- ours ------------------------------------------------------------------------------------------


def task_of(choice: str, seed: int, settings: Settings) -> dict[str, Any]:
    """The task of a model, as `qtorch train model=...` would compose it."""
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
        overrides.append(CONCEPTS.format(_concepts(settings)))
    overrides += [each for each in variant if each != CONCEPTS]
    task: dict[str, Any] = composed("train", overrides)["task"]
    dataset = task["dataset"]
    dataset["segments"] = {k: getattr(settings, k) for k in ("train", "valid", "test")}
    dataset["handler"] |= {"instruments": _names(settings), **_span(settings)}
    task["record"] = [r for r in task["record"] if not r["_target_"].endswith("SegmentICRecord")]
    return task


def _quality(choice: str, seed: int, settings: Settings) -> dict[str, Any]:
    (recorder,) = TrainerR("zoo", default_rec_name=choice)([task_of(choice, seed, settings)])
    if recorder.status != "FINISHED":
        raise RuntimeError(recorder.list_tags().get("error", recorder.status))
    metrics, report = recorder.list_metrics(), recorder.load_object("fit_report")
    figures = {name: metrics[name] for name in ("IC", "ICIR", "Rank IC", "Rank ICIR")}
    rates = {"train_rate": report["samples_per_second"], "parameters": report.get("parameters")}
    kept = {k: report.get(k) for k in ("epochs", "best_epoch", "seconds", "samples")}
    return {**figures, **rates, **kept, "run": recorder.id}


def _speed(choice: str, settings: Settings) -> dict[str, Any]:
    """Samples a second of a short training and of a prediction, each after a first warm one."""
    task = task_of(choice, 0, settings)
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
    begin = time.perf_counter()
    scores = model.predict(dataset)
    seconds = time.perf_counter() - begin
    return {
        "train_rate": report["samples_per_second"],
        "predict_rate": len(scores) / seconds,
        "parameters": report.get("parameters"),
    }


# -- Qlib's ----------------------------------------------------------------------------------------


def qlib_job(network: str, seed: int | str, settings: Settings) -> Path:
    """A file that tells `zoo_qlib.py` what to train: the same instruments, days, features,
    processors and hyperparameters as ours."""
    task = task_of(network, 0, settings)
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
        **_span(settings),
        "columns": handler["infer_processors"][0]["col_list"],
        "work": str(path.with_suffix("")),
    }
    path.write_text(json.dumps(job))
    return path


def _qlib(network: str, seed: int | str, settings: Settings) -> dict[str, Any]:
    path = qlib_job(network, seed, settings)
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    command = [str(settings.qlib_python), str(SIDE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    cell: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if seed == SPEED:
        return cell
    scores = pd.read_csv(path.with_suffix(".csv"), parse_dates=["datetime"])
    scores = scores.set_index(["datetime", "instrument"])["score"]
    label = _label(settings)
    if len(scores.index.intersection(label.index)) < 0.99 * len(scores):
        raise RuntimeError("Qlib's scores are not of the samples that the labels are of")
    return {**ic_figures(*calc_ic(scores, label)), **cell}


@cache
def _label(settings: Settings) -> pd.Series:
    dataset = init_instance_by_config(task_of("lstm", 0, settings)["dataset"])
    return raw_label(dataset).iloc[:, 0]


# -- data ------------------------------------------------------------------------------------------


@cache
def _source(settings: Settings) -> Any:
    source = {"_target_": "qtorch.data.QlibSource", "provider_uri": settings.provider}
    return init_instance_by_config(source)


@cache
def _names(settings: Settings) -> list[str]:
    return list(_source(settings).instruments(settings.universe))[: settings.instruments]


def _span(settings: Settings) -> dict[str, str]:
    first = pd.Timestamp(settings.train[0]) - pd.Timedelta(days=WARM_UP_DAYS)
    # The last label looks two days ahead.
    last = pd.Timestamp(settings.test[1]) + pd.Timedelta(days=7)
    return {"start_time": f"{first:%Y-%m-%d}", "end_time": f"{last:%Y-%m-%d}"}


def _concepts(settings: Settings) -> Path:
    """Memberships for networks that need some, where the data name no industries: the signs of
    the first components of the returns in the year before the train segment, eight groups."""
    path = Path(settings.folder) / "concepts.parquet"
    if path.exists():
        return path
    last = pd.Timestamp(settings.train[0]) - pd.Timedelta(days=1)
    panel = _source(settings).load(
        ["close"],
        instruments=_names(settings),
        start_time=f"{last - pd.DateOffset(years=1):%Y-%m-%d}",
        end_time=f"{last:%Y-%m-%d}",
    )
    close = pd.DataFrame(panel.column("close").numpy(), columns=list(panel.instruments)).ffill()
    moves = close.pct_change(fill_method=None).fillna(0.0)
    moves = moves.sub(moves.mean(axis=1), axis=0)
    loading = np.linalg.svd(moves.to_numpy(), full_matrices=False)[2][:3]  # [3, N]
    group = (loading > np.median(loading, axis=1, keepdims=True)).T @ np.array([1, 2, 4])
    frame = pd.DataFrame({"instrument": moves.columns, "concept": [f"G{g}" for g in group]})
    temporary = path.with_suffix(f".{os.getpid()}")
    frame.to_parquet(temporary)
    temporary.replace(path)
    return path
