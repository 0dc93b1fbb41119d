"""Configurations of networks: arguments that follow from the data, building, and plain form."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import check_config, get_callable_kwargs, init_instance_by_config
from qtorch.core.names import import_path
from qtorch.data.dataset.samples import Samples
from qtorch.nn.network import Network

NETWORK_MODULE = "qtorch.nn"


def class_to_config(network: type) -> dict[str, Any]:
    """Return the configuration of a network by its class, whose arguments follow from the data.

    Raises ConfigError for a class that is no torch.nn.Module.
    """
    if not issubclass(network, nn.Module):
        raise ConfigError(
            f"the network is the class {network.__name__}; expected a class of torch.nn.Module."
        )
    return {"_target_": network}


def check_network_sizes(spec: Any) -> None:
    """Raise ConfigError for sizes and a dropout that none of qtorch's networks can have.

    A network itself is only built when the number of features is known. A size is an argument whose
    default is a whole number of at least 1.
    """
    if isinstance(spec, nn.Module):
        return
    target, arguments = get_callable_kwargs(spec, NETWORK_MODULE)
    if not str(target.__module__).startswith(NETWORK_MODULE):
        return
    check_config({"_target_": target, **arguments})
    parameters = inspect.signature(target).parameters
    for name, value in arguments.items():
        default = parameters[name].default
        is_size = isinstance(default, int) and not isinstance(default, bool) and default >= 1
        if is_size and isinstance(value, int) and value < 1:
            raise ConfigError(f"{name} of {target.__name__} is {value}; expected at least 1.")
        if name == "dropout" and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ConfigError(f"dropout of {target.__name__} is {value}; expected 0 to 1.")


def complete_network_config(
    spec: Any, samples: Samples, num_outputs: int | None = None
) -> dict[str, Any] | nn.Module:
    """Fill in the arguments of a network that depend on the data and are not configured.

    A live module is returned unchanged. `d_feat` is the number of features (for a flat network
    times the number of steps). Also filled in: `step_len`, `num_outputs` (by default the number of
    labels), `num_instruments` and `num_days` (of the panel), `label_horizon` (rows that the labels
    look ahead, if known), for an extra "concept" its width `num_concepts`, and for an argument
    `close_column` that names a feature its position `close_index`. Raises ConfigError if the
    configuration contradicts the data.
    """
    if isinstance(spec, nn.Module):
        return spec
    target, arguments = get_callable_kwargs(spec, NETWORK_MODULE)
    flat = getattr(target, "inputs", "window") == "flat"
    features, steps = samples.num_features, samples.num_steps
    labels = len(samples.label_names)
    parameters = inspect.signature(target).parameters
    data_arguments = {
        "d_feat": features * steps if flat else features,
        "step_len": steps,
        "num_outputs": max(labels, 1) if num_outputs is None else num_outputs,
        "num_instruments": len(samples.instruments),
        "num_days": len(samples.calendar),
        **{f"num_{name}s": each.width for name, each in samples.extras.items()},
        **({} if samples.horizon is None else {"label_horizon": samples.horizon}),
        **_column_positions(arguments, parameters, samples.feature_names),
    }
    for name, value in data_arguments.items():
        if name not in parameters:
            continue
        if arguments.get(name) is None:
            arguments[name] = value
        elif int(arguments[name]) != value:
            raise ConfigError(
                f"{name} of {getattr(target, '__name__', target)} is {arguments[name]}, but the "
                f"data have {value} ({features} features, {steps} steps, {labels} labels). Remove "
                "it: it is filled in automatically."
            )
    options = {}
    if isinstance(spec, Mapping):
        options = {k: spec[k] for k in ("_args_", "_recursive_") if k in spec}
    return {"_target_": import_path(target), **options, **arguments}


def is_lightning_module(spec: Any) -> bool:
    """Whether a network is a LightningModule with a training loop of its own.

    Raises ConfigError for a configuration whose class or argument does not exist.
    """
    if isinstance(spec, nn.Module):
        return isinstance(spec, pl.LightningModule)
    check_config(spec, NETWORK_MODULE)
    target = get_callable_kwargs(spec, NETWORK_MODULE)[0]
    return isinstance(target, type) and issubclass(target, pl.LightningModule)


def _column_positions(
    arguments: Mapping[str, Any], parameters: Iterable[str], names: Sequence[str]
) -> dict[str, int]:
    """Return `{name}_index` for each argument `{name}_column`, which names a feature."""
    positions = {}
    for parameter in parameters:
        argument = f"{parameter.removesuffix('_index')}_column"
        column = arguments.get(argument) if parameter.endswith("_index") else None
        if column is not None:
            if column not in names:
                raise ConfigError(unknown_name_message(argument, str(column), names, limit=40))
            positions[parameter] = list(names).index(column)
    return positions


def build_network(config: dict[str, Any] | nn.Module) -> nn.Module:
    """Build the network of a completed configuration; return a copy of a live one."""
    if isinstance(config, nn.Module):
        return copy.deepcopy(config)
    try:
        network = init_instance_by_config(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config['_target_']}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"the network is a {type(network).__name__}; expected a torch.nn.Module.")
    return network


def network_config(spec: Any) -> Any:
    """Return `spec` as plain data; a live qtorch network is described by its arguments.

    Raises ConfigError for any other live module.
    """
    if isinstance(spec, Network):
        spec = {**spec.config, "_target_": import_path(type(spec))}
    return plain_value(spec, "network")
