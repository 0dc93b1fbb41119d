"""What a dataset's processors have learnt, carried by the model that learnt from their output."""

from __future__ import annotations

from typing import Any

import torch

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.serial import State
from qtorch.model.finetuning import STATISTICS

ADAPTED_SHARE = 0.5  # of the new data's statistics in adapted ones


def fitted_statistics(dataset: Any) -> State | None:
    """What the processors of a dataset's handler have learnt; None where it has none to tell."""
    handler: Any = getattr(dataset, "handler", None)
    if not callable(getattr(handler, "fitted_state", None)):
        return None
    state: State = handler.fitted_state()
    return State(state.config, {k: v.detach().cpu().clone() for k, v in state.tensors.items()})


def apply_statistics(dataset: Any, learnt: State | None, how: str | None) -> None:
    """Normalise a dataset by what a fitted model's data were normalised by.

    "keep": the model's statistics alone. "refit" and None: the dataset's own, of its train
    segment. "adapt": half of each. The dataset's handler keeps what it is given. Raises
    ConfigError where the two handlers' processors differ.
    """
    if how is None or how == "refit":
        return
    if how not in STATISTICS:
        raise ConfigError(unknown_name("statistics", how, STATISTICS))
    handler: Any = getattr(dataset, "handler", None)
    if learnt is None or not callable(getattr(handler, "load_fitted", None)):
        whose = "the model" if learnt is None else "the dataset"
        raise ConfigError(
            f"statistics={how!r}: {whose} has no processors whose statistics are known; leave "
            "statistics out, or use a DatasetH with a DataHandlerLP."
        )
    if how == "adapt":
        dataset.view()  # fits the processors on this dataset's train segment
        learnt = _between(learnt, handler.fitted_state())
    handler.load_fitted(learnt)


def _between(old: State, new: State) -> State:
    if set(old.tensors) != set(new.tensors):
        raise ConfigError("statistics='adapt': the dataset's processors are not the model's.")
    mixed = {}
    for name, before in old.tensors.items():
        after = new.tensors[name].to(before)
        if after.shape != before.shape:
            raise ConfigError("statistics='adapt': the dataset's columns are not the model's.")
        mixed[name] = torch.lerp(before, after, ADAPTED_SHARE)
    return State(old.config, mixed)
