"""Tests that the default configuration learns a planted signal, and nothing from noise."""

from __future__ import annotations

import copy
from statistics import median

import numpy as np
import pytest

from qtorch import init_instance_by_config
from qtorch.data.source.synthetic import SyntheticSource
from qtorch.metrics.signal import calc_ic
from qtorch.model.lightning_model import LightningModel

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("learning")]


def daily_rank_ic(runs, status="FINISHED"):
    """Return the Rank IC of each test day, per run."""
    recorders = runs("qtorch")
    assert {r.status for r in recorders} == {status}
    return [r.load_object("sig_analysis/ric.pkl") for r in recorders]


def test_default_lstm_finds_half_of_the_planted_signal(qtorch_cli, runs):
    scores, threshold = [], 0.0
    for seed in range(3):
        # A part of an epoch is enough to find the signal; more would only take longer.
        result = qtorch_cli(
            "train", f"seed={seed}", "trainer.max_epochs=1", "+trainer.limit_train_batches=0.15",
            "segments.valid=0.02", "segments.test=0.21", "log_level=WARNING",
        )  # fmt: skip
        assert result.code == 0, result.err
        daily_ics = daily_rank_ic(runs)
        days = daily_ics[0].index
        planted_ic = SyntheticSource().signal_rank_ic(days[0], days[-1])
        assert len(days) > 300
        assert 0.05 < planted_ic.mean() < 0.08
        scores, threshold = [ric.mean() for ric in daily_ics], planted_ic.mean() / 2
        # Two good scores decide the median of three.
        if sum(score >= threshold for score in scores) == 2:
            return
    assert median(scores) >= threshold


def test_no_signal_gives_no_rank_ic(qtorch_cli, runs):
    result = qtorch_cli(
        "train", "data.signal=0", "data.num_instruments=60", "trainer.max_epochs=1",
        "+trainer.limit_train_batches=0.5", "segments.valid=0.05", "segments.test=0.25",
        "log_level=WARNING",
    )  # fmt: skip
    assert result.code == 0, result.err
    (ric,) = daily_rank_ic(runs)
    error = ric.std() / np.sqrt(len(ric))
    assert error < 0.01
    assert abs(ric.mean()) < 1.96 * error


def test_fine_tuning_on_the_same_data_does_no_harm():
    source = {
        "_target_": "qtorch.data.SyntheticSource",
        "num_instruments": 60,
        "start_time": "2017-01-01",
        "end_time": "2019-12-31",
        "signal": 0.12,
    }
    handler = {
        "_target_": "qtorch.data.Alpha158",
        "source": source,
        "instruments": "stocks",
        "columns": ["KLEN", "KLOW", "ROC5", "ROC60", "MA5", "STD5", "RESI5", "CORR5", "VSTD5"],
        "infer_processors": [
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": [
            {"class": "DropnaLabel"},
            {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
        ],
    }
    segments = {
        "train": ("2017-03-01", "2018-09-30"),
        "valid": ("2018-10-01", "2018-12-31"),
        "test": ("2019-01-01", "2019-12-20"),
    }
    dataset = init_instance_by_config(
        {
            "_target_": "qtorch.data.TSDatasetH",
            "handler": handler,
            "segments": segments,
            "step_len": 4,
        }
    )
    label = dataset.samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]

    def rank_ic(model) -> float:
        return calc_ic(model.predict(dataset), label)[1].mean()

    before, after = [], {"all": [], "lora": []}
    for seed in range(3):
        model = LightningModel(
            {"_target_": "qtorch.nn.GRU", "hidden_size": 16, "num_layers": 1},
            optimizer={"_target_": "torch.optim.Adam", "lr": 2e-3},
            trainer={"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False},
            checkpoint={"enabled": False},
            seed=seed,
        )
        model.fit(dataset)
        before.append(rank_ic(model))
        for variant, options in (("all", {}), ("lora", {"lora": {"rank": 2}})):
            finetuned_model = copy.deepcopy(model)
            finetuned_model.finetune(dataset, max_epochs=2, **options)
            after[variant].append(rank_ic(finetuned_model))
    spread = max(before) - min(before)
    assert np.mean(before) > 0.05  # the network has learnt something that it could lose
    for variant in after:
        assert np.mean(after[variant]) > np.mean(before) - max(spread, 0.005), (before, after)
