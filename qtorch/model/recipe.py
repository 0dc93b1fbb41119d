"""How to train a model, and the result of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qtorch.data.dataset.samples import Samples
from qtorch.model.devices.step_graph import GraphMode
from qtorch.model.loop.day_label import DayLabel
from qtorch.model.loop.factories import Spec
from qtorch.model.loop.options import TrainerOptions
from qtorch.model.loop.schedules import SchedulerPlan


@dataclass
class Recipe:
    """How to train: the validated arguments of a model."""

    loss: Spec
    module: Spec | None
    day_label: Mapping[str, Any] | DayLabel | None
    optimizer: Spec | None
    scheduler: Spec | SchedulerPlan | None
    batch: dict[str, Any]
    trainer: TrainerOptions
    monitor: str
    early_stop: int | Mapping[str, Any] | None
    checkpoint: dict[str, Any]
    inner_steps: int | str
    compile: bool | dict[str, Any]
    seed: int
    matmul_precision: str | None = None
    cuda_graph: GraphMode = False


@dataclass
class FitResult:
    """The result of a training: network with the best weights, metric history, report.

    `validation_names` are the metrics that were logged by validations.
    """

    network: nn.Module
    history: list[dict[str, float]]
    report: dict[str, Any] = field(default_factory=dict)
    optimizer_state: dict[str, Any] | None = None
    validation_names: set[str] = field(default_factory=set)


@dataclass
class FitInputs:
    """What a fit trains on: network, samples, settings, and where its result goes.

    `make_network` builds the network and is called with seeded random generators. `start` describes
    where the initial weights come from. `store_result` gives the result to the model; it raises
    DataError for weights that are not finite.
    """

    make_network: Callable[[], nn.Module]
    train: Samples
    valid: Samples | None
    recipe: Recipe
    device: torch.device
    start: str
    store_result: Callable[[FitResult], None]
