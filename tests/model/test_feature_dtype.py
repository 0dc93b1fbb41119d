"""Trainings and predictions on features of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import ToyDataset, fit_model

from qtorch.data.dataset.shared_samples import read_samples, write_samples
from qtorch.metrics import calc_ic

LSTM = {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "num_layers": 1}


class RoundedDataset(ToyDataset):
    """The toy dataset with features of another dtype."""

    feature_dtype = torch.float32

    def samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super().samples(*args, **kwargs)
        samples.feature_dtype = self.feature_dtype
        return samples


def make_dataset(dtype: torch.dtype) -> RoundedDataset:
    dataset = RoundedDataset(num_days=150)
    dataset.feature_dtype = dtype
    return dataset


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_ic_moves_by_less_than_a_thousandth(name: str) -> None:
    """Whether only the prediction or the training too has 16 bits."""
    dtype = getattr(torch, name)
    label = make_dataset(torch.float32).samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]

    def mean_ic(scores: Any) -> float:
        return float(calc_ic(scores, label)[0].mean())

    full = fit_model(make_dataset(torch.float32), LSTM, epochs=3)
    expected = mean_ic(full.predict(make_dataset(torch.float32)))
    assert expected > 0.3
    assert mean_ic(full.predict(make_dataset(dtype))) == pytest.approx(expected, abs=1e-3)
    half = fit_model(make_dataset(dtype), LSTM, epochs=3)
    assert mean_ic(half.predict(make_dataset(dtype))) == pytest.approx(expected, abs=1e-3)
    assert half.fit_report_["feature_dtype"] == name
    sizes = [model.fit_report_["memory"]["features"] for model in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_ranks_read_16_bit_features(tmp_path: Path) -> None:
    samples = make_dataset(torch.bfloat16).samples("train")
    write_samples([samples], tmp_path)
    (copy,) = read_samples(tmp_path)
    assert copy is not None
    rows = torch.arange(20)
    assert torch.equal(copy.batch(rows).x, samples.batch(rows).x)
    assert copy.feature_pack.values.dtype == torch.bfloat16
