"""A fake model, dataset and record without a network, which train in milliseconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from qtorch.core.configured import Configured
from qtorch.core.serial import Serializable
from qtorch.model.base import Model
from qtorch.record.base import Record


def index() -> pd.MultiIndex:
    dates = pd.bdate_range("2020-01-01", periods=6).as_unit("ns")
    return pd.MultiIndex.from_product([dates, list("ABCDE")], names=["datetime", "instrument"])


class FakeDataset(Serializable, Configured):
    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.segments = {"test": ("2020-01-01", "2020-01-08")}

    def fingerprint(self) -> str:
        return f"noise {self.noise}"

    def prepare(self, segments, col_set="__all", data_key="infer"):
        values = np.random.default_rng(0).normal(size=len(index()))
        return pd.DataFrame({"LABEL0": values}, index=index())


class FakeModel(Model):
    def __init__(self, value: float = 1.0, fail: str | None = None, log: str | None = None) -> None:
        self.value = value
        self.fail = fail
        self.log = log
        self.random_number = None

    def fit(self, dataset, reweighter=None, *, recorder=None):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{os.getpid()} {os.getppid()} {self.value}\n")
        if self.fail == "error":
            raise ValueError("this model fails\non two lines")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "exit":
            raise SystemExit(1)
        if self.fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail == "wait":
            end = time.monotonic() + 60
            while not Path(f"{self.log}.go").exists():
                assert time.monotonic() < end, "nobody lets this model go on"
                time.sleep(0.01)
        self.random_number = float(torch.rand(()))
        recorder.log_metrics(random_number=self.random_number)

    def predict(self, dataset, segment="test"):
        label = dataset.prepare(segment).iloc[:, 0]
        return self.value * label + np.arange(len(label)) % 3


class PathRecord(Record):
    """Saves the classes of its arguments, to check how placeholders are replaced."""

    def __init__(self, model=None, dataset=None, recorder=None, note: str = "") -> None:
        super().__init__(recorder)
        self.model, self.dataset, self.note = model, dataset, note

    def generate(self) -> None:
        classes = {"model": type(self.model).__name__, "dataset": type(self.dataset).__name__}
        self.save(**{f"classes{self.note}": classes})
