"""What a dataset's processors have learnt, carried by the model that learnt from their output."""

from __future__ import annotations

from typing import Any

import torch

from qtorch.core.errors import ConfigError, DataError, unknown_name
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
        learnt = between(learnt, handler.fitted_state())
    handler.load_fitted(learnt)


def between(old: State, new: State) -> State:
    """Half of each, column by column: by name, for the new data may hold them in another order."""
    kinds = [[p is None for p in state.config["processors"]] for state in (old, new)]
    if kinds[0] != kinds[1] or set(old.tensors) != set(new.tensors):
        raise ConfigError("statistics='adapt': the dataset's processors are not the model's.")
    mixed = {}
    for name, before in old.tensors.items():
        number = int(name.split(".")[1])  # processors.K.NAME
        order = _order(old.config["processors"][number], new.config["processors"][number])
        after = new.tensors[name].to(before)
        after = after if order is None else after[order]
        if after.shape != before.shape:
            raise ConfigError("statistics='adapt': the dataset's columns are not the model's.")
        mixed[name] = torch.lerp(before, after, ADAPTED_SHARE)
    return State(old.config, mixed)


def _order(old: dict[str, Any], new: dict[str, Any]) -> list[int] | None:
    """Where the new processor has the old one's columns; None where it tells no columns."""
    if "columns" not in old or "columns" not in new:
        return None
    there = {(str(g), str(n)): k for k, (g, n) in enumerate(new["columns"])}
    wanted = [(str(g), str(n)) for g, n in old["columns"]]
    missing = [n for g, n in wanted if (g, n) not in there]
    added = [n for g, n in there if (g, n) not in set(wanted)]
    if missing or added:
        differences = [
            f"{what} {', '.join(names[:8])}"
            for what, names in (("missing are", missing), ("new are", added))
            if names
        ]
        raise DataError(
            "statistics='adapt': the dataset's columns are not the model's: "
            f"{'; '.join(differences)}."
        )
    return [there[column] for column in wanted]
