"""The identity of a training, so that it resumes only from its own checkpoints."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.data.sample_set import Samples

if TYPE_CHECKING:
    from qtorch.model.fitting import Recipe


def training_identity(
    network: nn.Module, train: Samples, valid: Samples | None, recipe: Recipe, start: str
) -> str:
    """Return a hash of what defines a training: network, data, batches, optimizer, seed, start.

    It does not depend on how long the training runs or how progress is displayed.
    """
    options = recipe.trainer
    parts = {
        "network": [[k, list(v.shape)] for k, v in network.state_dict().items()],
        "class": type(network).__qualname__,
        "data": [None if s is None else data_identity(s) for s in (train, valid)],
        "batch": {k: v for k, v in recipe.batch.items() if k != "eval_size"},
        "rules": [_describe_spec(s) for s in (recipe.loss, recipe.optimizer, recipe.scheduler)],
        "clip": [options.clip_value, options.clip_algorithm, options.accumulate],
        "limit": options.limit_train,
        "precision": str(options.arguments.get("precision")),
        "seed": recipe.seed,
        "start": start,
        **{
            name: _describe_spec(value)
            for name, value in (("module", recipe.module), ("day_label", recipe.day_label))
            if value is not None
        },
    }
    return digest(parts)


def data_identity(samples: Samples) -> list[Any]:
    """Return a short description of samples that is unlikely to be shared by other samples."""
    description = samples.describe()
    sums = [
        None if t is None else float(torch.nan_to_num(t).double().sum())
        for t in (samples.date, samples.instrument, samples.target, samples.weight)
    ]
    names = hashlib.sha256(repr(samples.feature_names).encode()).hexdigest()
    return [
        description["samples"],
        description["start"],
        description["end"],
        samples.step_len,
        names,
        *sums,
    ]


def _describe_spec(spec: Any) -> Any:
    try:
        return plain_value(spec)
    except ConfigError:
        return type(spec).__qualname__
