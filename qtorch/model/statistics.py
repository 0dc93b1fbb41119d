"""Processor statistics that a fitted model carries, to normalize new data in the same way."""

from __future__ import annotations

from typing import Any

import torch

from qtorch.core.errors import ConfigError, DataError, unknown_name
from qtorch.core.serial import State
from qtorch.model.finetuning import STATISTICS

ADAPT_WEIGHT = 0.5  # weight of the new data's statistics with statistics="adapt"


def get_statistics(dataset: Any) -> State | None:
    """Return the fitted state of the processors of a dataset's handler, or None if it has none."""
    handler: Any = getattr(dataset, "handler", None)
    if not callable(getattr(handler, "get_fitted_state", None)):
        return None
    state: State = handler.get_fitted_state()
    return State(state.config, {k: v.detach().cpu().clone() for k, v in state.tensors.items()})


def apply_statistics(dataset: Any, model_statistics: State | None, mode: str | None) -> None:
    """Normalize a dataset with the statistics of a fitted model.

    "keep" uses the model's statistics, "refit" and None the dataset's own (of its train segment),
    "adapt" the mean of both. This changes the state of the dataset's handler. Raises ConfigError if
    the two handlers' processors differ.
    """
    if mode is None or mode == "refit":
        return
    if mode not in STATISTICS:
        raise ConfigError(unknown_name("statistics", mode, STATISTICS))
    handler: Any = getattr(dataset, "handler", None)
    if model_statistics is None or not callable(getattr(handler, "load_fitted_state", None)):
        owner = "the model" if model_statistics is None else "the dataset"
        raise ConfigError(
            f"statistics={mode!r}: {owner} has no processors with fitted statistics; omit "
            "statistics, or use a DatasetH with a DataHandlerLP."
        )
    if mode == "adapt":
        dataset.view()  # fits the processors on this dataset's train segment
        model_statistics = interpolate_statistics(model_statistics, handler.get_fitted_state())
    handler.load_fitted_state(model_statistics)


def interpolate_statistics(old: State, new: State) -> State:
    """Return the mean of two states, column by column.

    Columns are matched by name, because their order may differ.
    """
    has_no_state = [[p is None for p in state.config["processors"]] for state in (old, new)]
    if has_no_state[0] != has_no_state[1] or set(old.tensors) != set(new.tensors):
        raise ConfigError("statistics='adapt': the dataset's processors differ from the model's.")
    tensors = {}
    for name, old_value in old.tensors.items():
        processor_index = int(name.split(".")[1])  # processors.K.NAME
        column_order = _column_order(
            old.config["processors"][processor_index], new.config["processors"][processor_index]
        )
        new_value = new.tensors[name].to(old_value)
        new_value = new_value if column_order is None else new_value[column_order]
        if new_value.shape != old_value.shape:
            raise ConfigError("statistics='adapt': the dataset's columns differ from the model's.")
        tensors[name] = torch.lerp(old_value, new_value, ADAPT_WEIGHT)
    return State(old.config, tensors)


def _column_order(old: dict[str, Any], new: dict[str, Any]) -> list[int] | None:
    """Return the position of each old column in the new processor, or None without column names."""
    if "columns" not in old or "columns" not in new:
        return None
    positions = {(str(g), str(n)): k for k, (g, n) in enumerate(new["columns"])}
    old_columns = [(str(g), str(n)) for g, n in old["columns"]]
    missing = [n for g, n in old_columns if (g, n) not in positions]
    extra = [n for g, n in positions if (g, n) not in set(old_columns)]
    if missing or extra:
        differences = [
            f"{label} {', '.join(names[:8])}"
            for label, names in (("missing:", missing), ("additional:", extra))
            if names
        ]
        raise DataError(
            "statistics='adapt': the dataset's columns differ from the model's: "
            f"{'; '.join(differences)}."
        )
    return [positions[column] for column in old_columns]
