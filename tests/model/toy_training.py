"""A small market and a recorder, in memory or in a file, for tests of training.

As a script it runs a training in a process of its own, which a test may kill; see `main`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.extras import Concepts
from qtorch.data.dataset.samples import Samples, build_samples
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.elementwise import Affine, FillNaN
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.model.loop.interruption import TrainingInterrupted

NUM_FEATURES = 4
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}


class ToyDataset:
    """Noise features, and a label that is a known mixture of the newest two days' features.

    30 instruments with missing rows. The label "label" is the raw label divided by its standard
    deviation, so that the two differ. With several labels, the second is the signal without noise,
    and the others are its negative. This share of the features, `missing`, is NaN and filled by
    elementwise operations. With `concepts` each instrument belongs to one of five.
    """

    def __init__(
        self,
        num_days: int = 60,
        num_instruments: int = 30,
        step_len: int = 3,
        num_labels: int = 1,
        num_features: int = NUM_FEATURES,
        missing: float = 0.0,
        concepts: bool = False,
    ) -> None:
        rng = np.random.default_rng(0)
        days = pd.date_range("2020-01-01", periods=num_days, name="datetime")
        names = pd.Index([f"S{k:03d}" for k in range(num_instruments)], name="instrument")
        x = rng.normal(size=(num_days, num_instruments, num_features)).astype(np.float32)
        previous_x = np.concatenate([x[:1], x[:-1]])
        signal = x[:, :, 0] - 0.5 * previous_x[:, :, 1]
        raw = 0.02 * (signal + rng.normal(size=signal.shape))
        labels = [raw / raw.std(), signal, *[-signal] * num_labels][:num_labels]
        values = np.concatenate([x, np.stack([raw, *labels], 2)], axis=2)
        rows = torch.tensor(rng.random((num_days, num_instruments)) > 0.1)
        label_names = ["LABEL", *(f"LABEL{k}" for k in range(1, num_labels))]
        values[:, :, :num_features][rng.random(x.shape) < missing] = np.nan
        fields = [*(f"F{k}" for k in range(num_features)), "RAW", *label_names]
        panel = Panel(torch.tensor(values, dtype=torch.float32), days, names, fields)
        features = PanelColumns(panel, fields[:num_features])
        if missing:
            for operation in (Affine(0.0, 1.0), FillNaN(0.0)):
                features = features.with_elementwise(fields[:num_features], operation)
        columns = {
            "feature": features,
            "label": PanelColumns(panel, label_names),
        }
        self.raw = PanelColumns(panel, ["RAW"])
        self.view = View(columns, rows, rows)
        self.step_len, self.concepts = step_len, concepts
        boundaries = [int(num_days * fraction) for fraction in (0.6, 0.8)]
        self.segments = {
            "train": (days[0], days[boundaries[0] - 1]),
            "valid": (days[boundaries[0]], days[boundaries[1] - 1]),
            "test": (days[boundaries[1]], days[-1]),
        }

    def samples(
        self, segment: str | slice, *, data_key: str = "infer", purge: bool = False
    ) -> Samples:
        dates = segment if isinstance(segment, slice) else slice(*self.segments[segment])
        samples = build_samples(
            self.view,
            start=dates.start,
            end=dates.stop,
            raw_label=self.raw,
            step_len=self.step_len,
            learn=data_key == "learn",
        )
        if self.concepts:
            names = list(samples.instruments)
            table = pd.DataFrame({"instrument": names})
            table["concept"] = [f"C{k % 5}" for k in range(len(names))]
            concepts = Concepts(table).bind(samples.calendar, samples.instruments)
            samples.extras = {"concept": concepts}
        return samples


class ToyRecorder:
    """A recorder that keeps logged metrics in memory and as lines of a file."""

    id = "toy"
    uri = None

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.points: list[tuple[str, int, float]] = []
        self.tags: dict[str, Any] = {}
        self.params: dict[str, Any] = {}

    def checkpoint_dir(self) -> Path:
        return self.folder / "checkpoints"

    def log_batch(self, metrics: dict[str, float], step: int = 0) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for key, value in metrics.items():
                self.points.append((key, step, value))
                file.write(json.dumps([key, step, value]) + "\n")

    def log_params(self, **params: Any) -> None:
        self.params.update(params)

    def set_tags(self, **tags: Any) -> None:
        self.tags.update(tags)

    def history(self) -> dict[tuple[str, int], float]:
        """Return each logged (key, step) once; raise if it was logged with two different values."""
        out: dict[tuple[str, int], float] = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            key, step, value = json.loads(line)
            if (key, step) in out and out[key, step] != value:
                raise AssertionError(f"{key} at {step}: {out[key, step]} and then {value}")
            out[key, step] = value
        return out


def make_model(network: Any = None, *, epochs: int = 2, **changes: Any) -> Any:
    """Return a small model that is trained without checkpoints."""
    from qtorch.model.lightning_model import LightningModel

    trainer = {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
    trainer |= changes.pop("trainer", {})
    arguments = {
        "network": network or {"_target_": "qtorch.nn.MLP", "layers": [8], "dropout": 0.0},
        "optimizer": ADAM,
        "batch": {"size": 64},
        "checkpoint": {"enabled": False},
        "seed": 3,
    }
    return LightningModel(**{**arguments, **changes}, trainer=trainer)


def fit_model(
    dataset: Any,
    network: Any = None,
    *,
    reweighter: Any = None,
    recorder: Any = None,
    **changes: Any,
) -> Any:
    """Return the model that `make_model` makes, after its fit."""
    model = make_model(network, **changes)
    model.fit(dataset, reweighter, recorder=recorder)
    return model


def model_weights(model: Any) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = model.network_.state_dict()
    return weights


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names and are bit-identical."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def resumable_model(**changes: Any) -> Any:
    """Return a model whose training depends on everything that a checkpoint must save."""
    from qtorch.model.lightning_model import LightningModel

    arguments: dict[str, Any] = {
        "network": {"_target_": "qtorch.nn.LSTM", "hidden_size": 8, "dropout": 0.3},
        "optimizer": ADAM,
        "scheduler": {
            "scheduler": {
                "_target_": "torch.optim.lr_scheduler.StepLR",
                "step_size": 3,
                "gamma": 0.9,
            },
            "interval": "step",
        },
        "batch": {"size": 50},
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        },
        "monitor": "rank_ic",
        "early_stop": 10,
        "checkpoint": {"every_n_steps": 4},
        "inner_steps": 3,
        "seed": 5,
    }
    return LightningModel(**{**arguments, **changes})


def main(
    folder: str, kill_step: str = "never", signal_name: str = "SIGKILL", trainer: str = "{}"
) -> None:
    """Train in `folder`; send this process a signal before batch `kill_step` ("epoch:step").

    `trainer` is a JSON object with other arguments of the trainer. Writes the weights to
    `folder/weights.pt` if training finishes.
    """
    from qtorch.data.dataset.batches import BatchLoader

    torch.set_num_threads(1)
    original_batches = BatchLoader.batches

    def failing_batches(self: Any, epoch: int, start_step: int = 0) -> Any:
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and f"{epoch}:{step}" == kill_step:
                os.kill(os.getpid(), getattr(signal, signal_name))
            yield batch

    BatchLoader.batches = failing_batches  # type: ignore[method-assign]
    model = resumable_model()
    model.trainer |= json.loads(trainer)
    model.fit(ToyDataset(), recorder=ToyRecorder(Path(folder)))
    torch.save(model.network_.state_dict(), Path(folder) / "weights.pt")


def fit_with_and_without_stop(
    models: Sequence[Any], dataset: Any, folder: Path, monkeypatch: Any
) -> list[ToyRecorder]:
    """Fit one model to its end and stop another one in the second epoch; return their recorders."""
    recorders = [ToyRecorder(folder / name) for name in ("whole", "stopped")]
    for recorder in recorders:
        recorder.folder.mkdir()
    models[0].fit(dataset, recorder=recorders[0])
    original_batches = BatchLoader.batches

    def stopping_batches(self: Any, epoch: int, start_step: int = 0) -> Iterator[Any]:
        for step, batch in enumerate(original_batches(self, epoch, start_step), start_step):
            if self.order == "random" and (epoch, step) == (1, 10):
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "batches", stopping_batches)
        try:
            models[1].fit(dataset, recorder=recorders[1])
        except TrainingInterrupted:
            return recorders
    raise AssertionError("the training was not stopped")


if __name__ == "__main__":
    main(*sys.argv[1:])
