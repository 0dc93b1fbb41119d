"""Optuna's samplers, pruners and distributions, by name or by configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.trust import locate
from qtorch.study.search.trial import Choice, Space, Span

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "grid": "GridSampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "qmc": "QMCSampler",
    "nsgaii": "NSGAIISampler",
}
PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "hyperband": "HyperbandPruner",
    "halving": "SuccessiveHalvingPruner",
    "threshold": "ThresholdPruner",
}


def build_sampler(spec: Any, seed: int | None, space: Space) -> optuna.samplers.BaseSampler:
    """Build a sampler from a name or configuration; a seed in the configuration wins."""
    options = _options(spec, SAMPLERS, "sampler", "optuna.samplers")
    if is_grid(spec):
        options = {
            "search_space": grid_values(space),
            "seed": 0,
            **options,
        }  # all processes walk the grid in one order
    options.setdefault("seed", seed)
    sampler: optuna.samplers.BaseSampler = _instantiate(
        options, optuna.samplers.BaseSampler, "sampler"
    )
    return sampler


def is_grid(spec: Any) -> bool:
    """Whether a sampler visits every point of the space exactly once."""
    sampler = locate(_options(spec, SAMPLERS, "sampler", "optuna.samplers")["_target_"])
    return isinstance(sampler, type) and issubclass(sampler, optuna.samplers.GridSampler)


def build_pruner(spec: Any) -> optuna.pruners.BasePruner:
    """Build a pruner from a name or configuration; None never prunes."""
    if spec is None:
        return optuna.pruners.NopPruner()
    options = _options(spec, PRUNERS, "pruner", "optuna.pruners")
    pruner: optuna.pruners.BasePruner = _instantiate(options, optuna.pruners.BasePruner, "pruner")
    return pruner


def grid_values(space: Space) -> dict[str, list[Any]]:
    """Return the grid of values of each parameter; ConfigError for a continuous parameter."""
    values_by_name: dict[str, list[Any]] = {}
    for name, part in space.items():
        values = list(part.options) if isinstance(part, Choice) else part.grid()
        if values is None:
            raise ConfigError(f"{name} is an interval, which has no grid: use choice or range.")
        values_by_name[name] = values
    return values_by_name


def _options(spec: Any, class_names: Mapping[str, str], label: str, module: str) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        if "_target_" not in spec:
            raise ConfigError(f"the configuration of a {label} needs _target_; got {dict(spec)}.")
        return dict(spec)
    if spec not in class_names:
        raise ConfigError(unknown_name_message(label, str(spec), class_names))
    return {"_target_": f"{module}.{class_names[str(spec)]}"}


def _instantiate(options: dict[str, Any], kind: type, label: str) -> Any:
    with suppress_warnings():
        instance = init_instance_by_config(options)
    if not isinstance(instance, kind):
        raise ConfigError(f"{options['_target_']} is not an Optuna {label}.")
    return instance


def placeholder_sampler() -> optuna.samplers.BaseSampler:
    """Build a cheap sampler for operations that draw no parameters."""
    return optuna.samplers.RandomSampler()


def build_distribution(part: Choice | Span) -> BaseDistribution:
    """Convert a parameter of the search space to an Optuna distribution."""
    if isinstance(part, Choice):
        return CategoricalDistribution(part.options)
    if part.integer:
        return IntDistribution(int(part.low), int(part.high), part.log, int(part.step or 1))
    return FloatDistribution(part.low, part.high, part.log, part.step)


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features and late values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
