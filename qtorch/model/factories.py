"""Losses, optimizers and schedulers from what a configuration says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.metrics.loss import MAE, MSE, Combined, CrossEntropy, Huber, Loss, Quantile
from qtorch.metrics.ranking import IC, ListMLE, ListNet, Pairwise, RankIC

LOSSES: dict[str, type[Loss]] = {
    "mse": MSE,
    "mae": MAE,
    "huber": Huber,
    "quantile": Quantile,
    "cross_entropy": CrossEntropy,
    "ic": IC,
    "rank_ic": RankIC,
    "pairwise": Pairwise,
    "listnet": ListNet,
    "listmle": ListMLE,
}
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class SchedulerPlan:
    """A factory of schedulers and when they step.

    `interval` is "epoch" (after validation) or "step" (after each optimizer step), `frequency`
    how many of them, `monitor` the metric that a scheduler such as ReduceLROnPlateau is given.
    """

    factory: Callable[[Optimizer], Any]
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None


def loss_of(spec: Any) -> Callable[..., Any]:
    """A loss: a name of `LOSSES`; a configuration; a callable (score, target) -> scalar; or a
    mapping {name: weight} of several, whose weighted sum it is."""
    if isinstance(spec, str) and "." not in spec:
        if spec not in LOSSES:
            raise ConfigError(unknown_name("loss", spec, LOSSES))
        return LOSSES[spec]()
    if isinstance(spec, Mapping) and not {"_target_", "class"} & set(spec):
        return _combined(spec)
    built = init_instance_by_config(spec) if isinstance(spec, str | Mapping) else spec
    if not callable(built):
        raise ConfigError(f"the loss is a {type(built).__name__}, which cannot be called.")
    return built  # type: ignore[no-any-return]  # callable() tells mypy nothing of its result


def _combined(spec: Mapping[Any, Any]) -> Combined:
    """`{"mse": 1.0, "ic": 0.5}`, or `{any: {"loss": ..., "weight": ...}}`."""
    parts = []
    for name, share in spec.items():
        given = share if isinstance(share, Mapping) else {"loss": str(name), "weight": share}
        if set(given) - {"loss", "weight"} or "loss" not in given:
            raise ConfigError(
                f"the loss {name!r} is given as {dict(given)}; expected a weight, or "
                "{'loss': ..., 'weight': ...}."
            )
        loss, weight = loss_of(given["loss"]), given.get("weight", 1.0)
        if not isinstance(loss, Loss):
            raise ConfigError(f"{name!r}: a sum is made of qtorch.metrics.loss.Loss alone.")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"the weight of the loss {name!r} is {weight!r}, not a number.")
        parts.append((loss, float(weight)))
    return Combined(parts)


def optimizer_factory(spec: Any) -> OptimizerFactory:
    """parameters -> optimizer; `spec` is None (Adam, lr 1e-3), a name of torch.optim, a
    configuration without `params`, or a callable."""
    if spec is None:
        return partial(torch.optim.Adam, lr=1e-3)
    if isinstance(spec, str) and "." not in spec:
        known = {n: c for n, c in vars(torch.optim).items() if _is_optimizer(c)}
        for name, found in known.items():
            if name.lower() == spec.lower():
                return cast(OptimizerFactory, found)
        raise ConfigError(unknown_name("optimizer", spec, known))
    return configured_factory(spec, "optimizer")


def explained(factory: OptimizerFactory) -> OptimizerFactory:
    """The factory, whose refusal of an argument (a word for the rate, say) is a ConfigError."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        try:
            return factory(parameters)
        except (TypeError, ValueError) as error:
            made = getattr(factory, "func", factory)
            given = getattr(factory, "keywords", {})
            name = getattr(made, "__name__", type(made).__name__)
            raise ConfigError(f"the optimizer {name} does not take {given}: {error}") from error

    return make


def with_rate(spec: Any, lr: float | None) -> Any:
    """An optimizer's specification with another learning rate (None: its own)."""
    return spec if lr is None else partial(cast(Any, optimizer_factory(spec)), lr=lr)


def scheduler_plan(spec: Any) -> SchedulerPlan | None:
    """What `spec` says: None; a configuration without `optimizer`; a callable; or a mapping with
    `scheduler` and any of `interval`, `frequency`, `monitor`."""
    if spec is None or isinstance(spec, SchedulerPlan):
        return spec
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping) and "scheduler" in spec:
        options = {k: v for k, v in spec.items() if k != "scheduler"}
        spec = spec["scheduler"]
        for name in options:
            if name not in ("interval", "frequency", "monitor"):
                valid = ("scheduler", "interval", "frequency", "monitor")
                raise ConfigError(unknown_name("option of scheduler", name, valid))
    plan = SchedulerPlan(configured_factory(spec, "scheduler"), **options)
    if plan.interval not in ("epoch", "step"):
        raise ConfigError(
            unknown_name("interval of the scheduler", plan.interval, ("epoch", "step"))
        )
    return plan


def configured_factory(spec: Any, what: str) -> Callable[..., Any]:
    """What makes a `what`: a name or configuration whose further arguments come later."""
    if isinstance(spec, str):
        spec = {"_target_": spec}
    if isinstance(spec, Mapping):
        if "_target_" not in spec:
            raise ConfigError(
                f"the {what} is configured by {sorted(spec)}; give "
                f"{{'_target_': 'torch.optim....', 'lr': ...}}."
            )
        spec = init_instance_by_config({**spec, "_partial_": True})
    if not callable(spec):
        raise ConfigError(
            f"the {what} is a {type(spec).__name__}; expected a configuration or a callable that "
            "makes one."
        )
    return spec  # type: ignore[no-any-return]  # as above


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Optimizer) and thing is not Optimizer
