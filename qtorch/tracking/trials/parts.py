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

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.tracking.trials.space import Choice, Space, Span

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


def sampler_of(spec: Any, seed: int | None, space: Space) -> optuna.samplers.BaseSampler:
    """A sampler by name or by configuration; `seed` counts unless the configuration has one."""
    options = _options(spec, SAMPLERS, "sampler", "optuna.samplers")
    if is_grid(spec):
        options = {"search_space": grid_of(space), "seed": 0, **options}  # one order for all
    options.setdefault("seed", seed)
    built: optuna.samplers.BaseSampler = _made(options, optuna.samplers.BaseSampler, "sampler")
    return built


def is_grid(spec: Any) -> bool:
    """Whether a sampler walks through all points of a space, each once."""
    name = spec.get("_target_") if isinstance(spec, Mapping) else SAMPLERS.get(str(spec))
    return str(name).rpartition(".")[2] == SAMPLERS["grid"]


def pruner_of(spec: Any) -> optuna.pruners.BasePruner:
    """A pruner by name or by configuration; None prunes nothing."""
    if spec is None:
        return optuna.pruners.NopPruner()
    options = _options(spec, PRUNERS, "pruner", "optuna.pruners")
    built: optuna.pruners.BasePruner = _made(options, optuna.pruners.BasePruner, "pruner")
    return built


def grid_of(space: Space) -> dict[str, list[Any]]:
    """The values of each part of a space that has countably many; ConfigError for another."""
    found: dict[str, list[Any]] = {}
    for name, part in space.items():
        values = list(part.options) if isinstance(part, Choice) else part.grid()
        if values is None:
            raise ConfigError(f"{name} is an interval, which has no grid: use choice or range.")
        found[name] = values
    return found


def _options(spec: Any, known: Mapping[str, str], what: str, module: str) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        if "_target_" not in spec:
            raise ConfigError(f"a {what}'s configuration needs _target_; got {dict(spec)}.")
        return dict(spec)
    if spec not in known:
        raise ConfigError(unknown_name(what, str(spec), known))
    return {"_target_": f"{module}.{known[str(spec)]}"}


def _made(options: dict[str, Any], kind: type, what: str) -> Any:
    with quiet():
        built = init_instance_by_config(options)
    if not isinstance(built, kind):
        raise ConfigError(f"{options['_target_']} is no {what} of Optuna's.")
    return built


def plain_sampler() -> optuna.samplers.BaseSampler:
    """One that does nothing where a trial is told or looked at."""
    return optuna.samplers.RandomSampler()


def distribution_of(part: Choice | Span) -> BaseDistribution:
    """A part of a space, as Optuna has it."""
    if isinstance(part, Choice):
        return CategoricalDistribution(part.options)
    if part.integer:
        return IntDistribution(int(part.low), int(part.high), part.log, int(part.step or 1))
    return FloatDistribution(part.low, part.high, part.log, part.step)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings of what it calls experimental, and of values that are told late."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
