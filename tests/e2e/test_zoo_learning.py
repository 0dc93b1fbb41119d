"""That every network of conf/model finds what is planted; a new one is found by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.cli.compose import composed
from qtorch.cli.config_path import config_path
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.data import Concepts
from qtorch.metrics import calc_ic

pytestmark = pytest.mark.slow

# A strong signal in a small market: half of it is found in seconds, or something is broken.
MARKET = (
    "data.num_instruments=80",
    "data.start_time=2018-01-01",
    "data.end_time=2019-09-30",
    "data.signal=0.4",
    "segments.train=[2018-07-02,2018-12-31]",
    "segments.valid=[2019-01-01,2019-03-31]",
    "segments.test=[2019-04-01,2019-09-26]",
    "dataset.step_len=8",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
)
SHARE = 0.5
LR, BATCH = 0.003, 200
# Wherever a network has such an argument: enough for this market, and quick.
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "dim_feedforward": 64,
    "n_d": 16,
    "n_a": 16,
    "n_steps": 3,
    "out_dim": 16,
    "vbs": BATCH,
    "weight_hidden_size": 16,
    # Epochs and days that a market of half a year has not.
    "pre_epoch": 1,
    "pretrain_epochs": 0,
    "lookback": 20,
}
HORIZONS = [f"Ref($close, -{k + 1}) / Ref($close, -1) - 1" for k in (1, 2, 3)]
# The networks that learn several labels.
NUM_LABELS = {"tcts": 3}
# Attention over features takes longer to settle; slow steps that learn much are soon enough.
EPOCHS = {"tabnet": 5, "add": 1, "mamba": 1, "patchtst": 1}
CHOICES = sorted(p.stem for p in config_path().joinpath("model").glob("*.yaml"))
CHOICES.remove("lightning")


@cache
def market(num_labels: int = 1) -> tuple[Any, pd.Series, float]:
    """The dataset, its test segment's raw label and the Rank IC that is planted there."""
    settings = composed("train", MARKET)
    if num_labels > 1:
        settings["dataset"]["handler"]["label"] = HORIZONS[:num_labels]
    dataset = init_instance_by_config(settings["dataset"])
    names = dataset.handler.source.instruments("stocks")
    sectors = {"instrument": sorted(names), "concept": [f"C{k % 4}" for k in range(len(names))]}
    dataset.extras = {"concept": Concepts(pd.DataFrame(sectors))}
    label = dataset.samples("test", data_key="infer").frame(("raw_label",)).iloc[:, 0]
    planted = dataset.handler.source.planted_rank_ic(*settings["segments"]["test"])
    return dataset, label, float(planted.mean())


def small(choice: str) -> Any:
    """The model of a choice: its own configuration, narrower and faster to learn."""
    config = composed("train", [*MARKET, f"model={choice}"])["model"]
    if "network" not in config:
        return config
    for part in ("network", "module"):
        given = config.get(part) or {}
        given |= {k: min(v, SMALL[k]) for k, v in given.items() if k in SMALL}
        given |= {k: 0.0 for k in given if k.endswith("dropout")}
    config["optimizer"]["lr"] = max(LR, config["optimizer"]["lr"])
    config["trainer"]["max_epochs"] = EPOCHS.get(choice, config["trainer"]["max_epochs"])
    config["batch"] |= {"size": BATCH, "days_per_batch": 1}
    return config


@pytest.mark.parametrize("choice", CHOICES)
def test_it_finds_at_least_half_of_a_strong_signal(choice: str) -> None:
    dataset, label, planted = market(NUM_LABELS.get(choice, 1))
    model = init_instance_by_config(small(choice))
    with session_context(seed=0):
        torch.manual_seed(0)
        model.fit(dataset)
    found = calc_ic(model.predict(dataset), label)[1]
    assert 0.3 < planted < 0.5
    assert len(found) > 100
    assert np.nanmean(found) >= SHARE * planted
