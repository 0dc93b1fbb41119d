"""A network from its configuration, completed by what only the data know."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import get_callable_kwargs, init_instance_by_config
from qtorch.core.names import dotted_name
from qtorch.data.sample_set import Samples
from qtorch.nn.network import Network

NETWORK_MODULE = "qtorch.nn"


def complete_network(
    spec: Any, samples: Samples, num_outputs: int | None = None
) -> dict[str, Any] | nn.Module:
    """`spec` with what the data know filled in, where the network takes it and the configuration
    does not say; a live module comes back unchanged.

    `d_feat` is the number of features, for a flat network times the number of steps; `step_len`,
    `num_outputs` (labels, unless given), `num_instruments` and `num_days` (of the panel),
    `label_horizon` (rows that the labels look ahead, where that is known), and for an extra
    "concept" `num_concepts`, its width. Raises ConfigError where the configuration says another
    number than the data.
    """
    if isinstance(spec, nn.Module):
        return spec
    target, given = get_callable_kwargs(spec, NETWORK_MODULE)
    flat = getattr(target, "inputs", "window") == "flat"
    features, steps = samples.num_features, samples.num_steps
    labels = len(samples.label_names)
    known = {
        "d_feat": features * steps if flat else features,
        "step_len": steps,
        "num_outputs": max(labels, 1) if num_outputs is None else num_outputs,
        "num_instruments": len(samples.instruments),
        "num_days": len(samples.calendar),
        **{f"num_{name}s": each.width for name, each in samples.extras.items()},
        **({} if samples.horizon is None else {"label_horizon": samples.horizon}),
    }
    takes = inspect.signature(target).parameters
    for name, value in known.items():
        if name not in takes:
            continue
        if given.get(name) is None:
            given[name] = value
        elif int(given[name]) != value:
            raise ConfigError(
                f"{name} of {getattr(target, '__name__', target)} is {given[name]}, but the data "
                f"have {value} ({features} features, {steps} steps, {labels} labels). Leave it "
                "out: it is filled in."
            )
    extra = {k: spec[k] for k in ("_args_", "_recursive_") if k in spec} if _is_map(spec) else {}
    return {"_target_": dotted_name(target), **extra, **given}


def build_network(complete: dict[str, Any] | nn.Module, *, stored: bool = False) -> nn.Module:
    """The network of a completed configuration; a copy of a live one, which stays as it is.

    `stored`: the configuration comes out of a store and its names pass the trust rule.
    """
    if isinstance(complete, nn.Module):
        return copy.deepcopy(complete)
    try:
        built = init_instance_by_config(complete, stored=stored)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{complete['_target_']}: {error}") from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"the network is a {type(built).__name__}, not a torch.nn.Module.")
    return built


def network_config(spec: Any) -> Any:
    """`spec` as plain data: a live network of ours by its own arguments.

    Raises ConfigError for another live module.
    """
    if isinstance(spec, Network):
        return plain_value(spec.config, "network")
    return plain_value(spec, "network")


def _is_map(spec: Any) -> bool:
    return isinstance(spec, Mapping)
