"""Save a fitted LightningModel as JSON and tensors, and load it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtorch.core.serial import State
from qtorch.model.matching import InputSchema
from qtorch.model.network_config import build_network, network_config

if TYPE_CHECKING:
    from qtorch.model.lightning_model import LightningModel

# Prefixes of tensors that are not weights of the network. No module name can contain "@".
STATISTICS, OPTIMIZER = "@statistics.", "@optimizer."


def get_model_state(model: LightningModel) -> State:
    """Return configuration, metrics, weights, and the state of optimizer and processors.

    Raises ConfigError if an argument is a live object that no configuration describes.
    """
    state: dict[str, Any] = {"model": model.to_config(), "fitted": None}
    if model.network_ is None:
        return State(state)
    input_schema, statistics = model.input_schema_, model.statistics_
    state["fitted"] = {
        "network": model.network_config_ or network_config(model.network),
        "learnt": None if input_schema is None else input_schema.to_dict(),
        "statistics": None if statistics is None else statistics.config,
        "seed": model.seed_,
        "evals_result": replace_nonfinite(model.evals_result_),
        "fit_report": replace_nonfinite(model.fit_report_),
    }
    tensors = {k: v.detach().cpu().clone() for k, v in model.network_.state_dict().items()}
    for name, tensor in ({} if statistics is None else statistics.tensors).items():
        tensors[STATISTICS + name] = tensor
    if model.optimizer_state_ is not None:
        state["fitted"]["optimizer"] = _extract_tensors(model.optimizer_state_, OPTIMIZER, tensors)
    return State(state, tensors)


def load_model_state(model: LightningModel, state: State) -> None:
    """Load a state from `get_model_state` into an unfitted model."""
    fitted_state = state.config["fitted"]
    if fitted_state is None:
        return
    model.network_ = build_network(fitted_state["network"], stored=True).eval()
    model.network_.load_state_dict({k: v for k, v in state.tensors.items() if k[0] != "@"})
    model.network_config_, model.seed_ = fitted_state["network"], fitted_state["seed"]
    # States saved by older versions have neither.
    input_schema, statistics = fitted_state.get("learnt"), fitted_state.get("statistics")
    model.input_schema_ = None if input_schema is None else InputSchema.from_dict(input_schema)
    if statistics is not None:
        statistics_tensors = {
            k.removeprefix(STATISTICS): v for k, v in state.tensors.items() if STATISTICS in k
        }
        model.statistics_ = State(statistics, statistics_tensors)
    if fitted_state.get("optimizer") is not None:
        model.optimizer_state_ = _insert_tensors(fitted_state["optimizer"], state.tensors)
    model.evals_result_ = _restore_nan(fitted_state["evals_result"])
    model.fit_report_ = fitted_state["fit_report"]


def weights_digest(network: nn.Module) -> str:
    """Return a hash of a network's weights."""
    sha256 = hashlib.sha256()
    for name, value in network.state_dict().items():
        sha256.update(name.encode())
        sha256.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return sha256.hexdigest()[:32]


def _extract_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace each tensor in a nested value by a name and store it in `tensors` under that name.

    Mappings are saved as lists of pairs because their keys may be numbers.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {"@tensor": name}
    if isinstance(value, Mapping):
        pairs = [[k, _extract_tensors(v, f"{name}{k}.", tensors)] for k, v in value.items()]
        return {"@map": pairs}
    if isinstance(value, list | tuple):
        return [_extract_tensors(v, f"{name}{k}.", tensors) for k, v in enumerate(value)]
    return value


def _insert_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if "@tensor" in value:
            return tensors[value["@tensor"]]
        return {k: _insert_tensors(v, tensors) for k, v in value["@map"]}
    return [_insert_tensors(v, tensors) for v in value] if isinstance(value, list) else value


def replace_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    if isinstance(value, Mapping):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restore_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _restore_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore_nan(v) for v in value]
    return math.nan if value is None else value
