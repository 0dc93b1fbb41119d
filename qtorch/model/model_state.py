"""A fitted LightningModel as JSON and tensors, and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qtorch.core.serial import State
from qtorch.model.matching import LearntFrom
from qtorch.model.network_config import build_network, network_config

if TYPE_CHECKING:
    from qtorch.model.lightning_model import LightningModel

# What is no weight of the network stands under a prefix that no module's name can have.
STATISTICS, OPTIMIZER = "@statistics.", "@optimizer."


def state_of(model: LightningModel) -> State:
    """Configuration, figures, weights, the optimizer's and the processors' state.

    Raises ConfigError where an argument is a live object that no configuration describes.
    """
    state: dict[str, Any] = {"model": model.to_config(), "fitted": None}
    if model.network_ is None:
        return State(state)
    learnt, statistics = model.learnt_, model.statistics_
    state["fitted"] = {
        "network": model.network_config_ or network_config(model.network),
        "learnt": None if learnt is None else learnt.plain(),
        "statistics": None if statistics is None else statistics.config,
        "seed": model.seed_,
        "evals_result": json_numbers(model.evals_result_),
        "fit_report": json_numbers(model.fit_report_),
    }
    tensors = {k: v.detach().cpu().clone() for k, v in model.network_.state_dict().items()}
    for name, tensor in ({} if statistics is None else statistics.tensors).items():
        tensors[STATISTICS + name] = tensor
    if model.optimizer_state_ is not None:
        state["fitted"]["optimizer"] = _taken_apart(model.optimizer_state_, OPTIMIZER, tensors)
    return State(state, tensors)


def take_state(model: LightningModel, state: State) -> None:
    """Make an unfitted model what `state_of` told of."""
    fitted = state.config["fitted"]
    if fitted is None:
        return
    model.network_ = build_network(fitted["network"], stored=True).eval()
    model.network_.load_state_dict({k: v for k, v in state.tensors.items() if k[0] != "@"})
    model.network_config_, model.seed_ = fitted["network"], fitted["seed"]
    # States of before these were kept have neither.
    learnt, statistics = fitted.get("learnt"), fitted.get("statistics")
    model.learnt_ = None if learnt is None else LearntFrom.from_plain(learnt)
    if statistics is not None:
        own = {k.removeprefix(STATISTICS): v for k, v in state.tensors.items() if STATISTICS in k}
        model.statistics_ = State(statistics, own)
    if fitted.get("optimizer") is not None:
        model.optimizer_state_ = _put_together(fitted["optimizer"], state.tensors)
    model.evals_result_ = _floats(fitted["evals_result"])
    model.fit_report_ = fitted["fit_report"]


def weights_digest(network: nn.Module) -> str:
    """A hash of a network's weights."""
    hashed = hashlib.sha256()
    for name, value in network.state_dict().items():
        hashed.update(name.encode())
        hashed.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return hashed.hexdigest()[:32]


def _taken_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data with a name for each tensor, which goes to `tensors`; keys may be numbers."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {"@tensor": name}
    if isinstance(value, Mapping):
        pairs = [[k, _taken_apart(v, f"{name}{k}.", tensors)] for k, v in value.items()]
        return {"@map": pairs}
    if isinstance(value, list | tuple):
        return [_taken_apart(v, f"{name}{k}.", tensors) for k, v in enumerate(value)]
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if "@tensor" in value:
            return tensors[value["@tensor"]]
        return {k: _put_together(v, tensors) for k, v in value["@map"]}
    return [_put_together(v, tensors) for v in value] if isinstance(value, list) else value


def json_numbers(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {k: json_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return math.nan if value is None else value
