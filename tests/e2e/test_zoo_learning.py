"""Tests that every network of conf/model, also a new one, learns a planted signal."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_libraries import require_model_library

from qtorch.cli.compose import compose_settings, config_path
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.data import Concepts
from qtorch.metrics import calc_ic

pytestmark = pytest.mark.slow

# A strong signal in a small market: a working network finds half of it in seconds.
MARKET = (
    "data.num_instruments=80",
    "data.start_time=2018-01-01",
    "data.end_time=2019-09-10",
    "data.signal=0.4",
    "segments.train=[2018-07-02,2018-12-31]",
    "segments.valid=[2019-01-01,2019-03-31]",
    "segments.test=[2019-04-01,2019-08-30]",
    "dataset.step_len=8",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
)
MIN_SHARE = 0.5
LR, BATCH = 0.005, 100
# Upper limits of networks' arguments: enough for this market, and fast.
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "dim_feedforward": 64,
    "n_d": 16,
    "n_a": 16,
    "n_steps": 3,
    "out_dim": 16,
    "vbs": 2 * BATCH,
    "weight_hidden_size": 16,
    # The small market has fewer epochs and days than the defaults need.
    "pre_epoch": 1,
    "pretrain_epochs": 0,
    "lookback": 20,
}
HORIZONS = [f"Ref($close, -{k + 1}) / Ref($close, -1) - 1" for k in (1, 2, 3)]
# Networks that learn several labels.
NUM_LABELS = {"tcts": 3}
# TabNet's attention over features and a plain MLP need more steps than an epoch has.
EPOCHS = {"tabnet": 5, "mlp": 2}
CHOICES = sorted(p.stem for p in config_path().joinpath("model").glob("*.yaml"))
CHOICES.remove("lightning")


@cache
def market(num_labels: int = 1) -> tuple[Any, pd.Series, float]:
    """Return the dataset, the raw label of its test segment, and the planted Rank IC there."""
    settings = compose_settings("train", MARKET)
    if num_labels > 1:
        settings["dataset"]["handler"]["label"] = HORIZONS[:num_labels]
    dataset = init_instance_by_config(settings["dataset"])
    names = dataset.handler.source.instruments("stocks")
    sectors = {"instrument": sorted(names), "concept": [f"C{k % 4}" for k in range(len(names))]}
    dataset.extras = {"concept": Concepts(pd.DataFrame(sectors))}
    label = dataset.samples("test", data_key="infer").frame(("raw_label",)).iloc[:, 0]
    planted_ic = dataset.handler.source.signal_rank_ic(*settings["segments"]["test"])
    return dataset, label, float(planted_ic.mean())


def build_small_model(choice: str) -> Any:
    """Build the model of a config, but narrower and with faster learning."""
    config = compose_settings("train", [*MARKET, f"model={choice}"])["model"]
    if "network" not in config:
        return config
    for part in ("network", "module"):
        arguments = config.get(part) or {}
        arguments |= {k: min(v, SMALL[k]) for k, v in arguments.items() if k in SMALL}
        arguments |= {k: 0.0 for k in arguments if k.endswith("dropout")}
    config["optimizer"]["lr"] = max(LR, config["optimizer"]["lr"])
    config["trainer"]["max_epochs"] = EPOCHS.get(choice, config["trainer"]["max_epochs"])
    size = 2 * BATCH if choice == "tabnet" else BATCH
    config["batch"] |= {"size": size, "days_per_batch": 1}
    return config


@pytest.mark.parametrize("choice", CHOICES)
def test_network_finds_half_of_a_strong_signal(choice: str) -> None:
    require_model_library(choice)
    dataset, label, planted_ic = market(NUM_LABELS.get(choice, 1))
    model = init_instance_by_config(build_small_model(choice))
    with session_context(seed=0):
        torch.manual_seed(0)
        model.fit(dataset)
    rank_ic = calc_ic(model.predict(dataset), label)[1]
    assert 0.3 < planted_ic < 0.5
    assert len(rank_ic) > 100
    assert np.nanmean(rank_ic) >= MIN_SHARE * planted_ic
