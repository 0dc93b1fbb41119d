"""Fixtures for the record tests: a run in its own store, and scores of known quality."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import qtorch
from qtorch import R


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A running recorder."""
    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/runs.db")
    with R.start(experiment_name="records"):
        yield R.get_recorder()


class TinyDataset:
    """A raw label per segment, with the column levels of a handler."""

    segments = {"train": None, "valid": None, "test": None}  # noqa: RUF012 - read only

    def __init__(self):
        self.requests = []

    def prepare(self, segment, col_set="__all", data_key="infer"):
        self.requests.append((segment, col_set, data_key))
        start = {"train": "2019-01-01", "valid": "2019-07-01", "test": "2020-01-01"}[segment]
        dates = pd.bdate_range(start, periods=40).as_unit("ns")
        index = pd.MultiIndex.from_product(
            [dates, [f"I{k}" for k in range(25)]], names=["datetime", "instrument"]
        )
        seed = {"train": 0, "valid": 1, "test": 2}[segment]
        values = np.random.default_rng(seed).normal(0, 0.02, len(index))
        return pd.DataFrame(values, index, pd.MultiIndex.from_tuples([("label", "LABEL0")]))


class TinyModel:
    """Predicts the label plus noise."""

    def __init__(self):
        self.requests = []

    def predict(self, dataset, segment="test"):
        self.requests.append(segment)
        label = dataset.prepare(segment).iloc[:, 0]
        noise = np.random.default_rng(9).normal(0, 0.05, len(label))
        return pd.Series(label.to_numpy() + noise, index=label.index, name="score")


@pytest.fixture
def dataset():
    """A TinyDataset."""
    return TinyDataset()


@pytest.fixture
def model():
    """A TinyModel."""
    return TinyModel()
