"""Learning rate schedules, and the length of a training that some of them need."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from qtorch.core.errors import ConfigError, check_count, check_name
from qtorch.core.instantiate import check_types, get_signature, resolve_config
from qtorch.model.loop.factories import Spec, build_factory, explain_errors
from qtorch.model.loop.progress import METRICS, MONITOR_NAMES, get_mode

OPTIONS = ("scheduler", "interval", "frequency", "monitor")
# An argument of this name is filled in if it is not configured.
LENGTH_ARGUMENTS = ("total_steps", "num_training_steps")
# Texts that stand for a number, as the value of an argument: {"T_max": "total_steps"}.
LENGTH_NAMES = ("total_steps", "max_epochs", "steps_per_epoch")
STEP_NAMES = ("total_steps", "steps_per_epoch")  # those that count optimizer steps
PERIODS = {"step_size", "T_max"}  # arguments of torch's schedulers, which divide by them
MANY_STEPS = 1_000_000  # stands for the steps of an epoch as long as there are no data


@dataclass(frozen=True)
class SchedulerPlan:
    """A scheduler factory and when the scheduler steps.

    `interval` is "epoch" (after validation) or "step" (after each optimizer step), `frequency` the
    number of intervals between two steps, `monitor` the metric that is passed to a scheduler such
    as ReduceLROnPlateau, once after each time that it is computed.
    """

    factory: Callable[[Optimizer], Any]
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None

    @property
    def metric(self) -> str:
        """The full name of the metric to monitor."""
        name = self.monitor or "loss"
        return MONITOR_NAMES.get(name, name)


@dataclass(frozen=True)
class SchedulerChain:
    """The factory of a scheduler of schedulers: SequentialLR or ChainedScheduler.

    `outer` builds it from an optimizer and the list of what `parts` build.
    """

    outer: Callable[..., Any]
    parts: tuple[Callable[..., Any], ...]

    def __call__(self, optimizer: Optimizer) -> Any:
        schedulers = [part(optimizer) for part in self.parts]
        return self.outer(optimizer=optimizer, schedulers=schedulers)


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is: its epochs and optimizer steps. `max_*` is -1 without a limit."""

    steps_per_epoch: int
    max_epochs: int
    max_steps: int

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps, or -1 if it has no limit."""
        if self.max_epochs == -1:
            return self.max_steps
        total = self.steps_per_epoch * self.max_epochs
        return total if self.max_steps == -1 else min(total, self.max_steps)

    @property
    def total_epochs(self) -> int:
        """The number of epochs that are at least begun, or -1 if it has no limit."""
        total = self.total_steps
        return total if total == -1 else -(-total // self.steps_per_epoch)


def scheduler_plan(spec: Spec | SchedulerPlan | None) -> SchedulerPlan | None:
    """Build a SchedulerPlan from `spec`.

    `spec` is None, a configuration without `optimizer`, a callable, or a mapping with `scheduler`
    and any of `interval`, `frequency`, `monitor`. The default interval is "step" for a schedule
    over the number of optimizer steps (such as OneCycleLR), otherwise "epoch". The `schedulers` of
    a SequentialLR or ChainedScheduler are such configurations as well. ReduceLROnPlateau gets the
    `mode` of the metric, unless it is configured.
    """
    if spec is None or isinstance(spec, SchedulerPlan):
        return spec
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping) and "scheduler" in spec:
        options = dict(spec)
        spec = options.pop("scheduler")
        for name in options:
            check_name("option of scheduler", name, OPTIONS)
    factory = _build_scheduler_factory(spec)
    if options.get("interval") is None:
        options["interval"] = "step" if _counts_steps(factory) else "epoch"
    plan = SchedulerPlan(factory, **options)
    check_name("interval of the scheduler", plan.interval, ("epoch", "step"))
    if not isinstance(plan.frequency, int) or plan.frequency < 1:
        raise ConfigError(
            f"frequency of the scheduler is {plan.frequency!r}; expected a whole number of at "
            "least 1."
        )
    check_name("metric for the scheduler", plan.metric, (*MONITOR_NAMES, *METRICS))
    if _product(factory) is ReduceLROnPlateau and "mode" not in _keyword_arguments(factory):
        plan = replace(plan, factory=partial(factory, mode=get_mode(plan.metric)))
    return plan


def _build_scheduler_factory(spec: Any) -> Callable[..., Any]:
    spec = resolve_config(spec)
    parts = spec.get("schedulers") if isinstance(spec, Mapping) else None
    if not isinstance(parts, list | tuple):
        return build_factory(spec, "scheduler")
    outer = build_factory({k: v for k, v in spec.items() if k != "schedulers"}, "scheduler")
    return SchedulerChain(outer, tuple(_build_scheduler_factory(part) for part in parts))


def complete_plan(plan: SchedulerPlan | None, length: TrainingLength) -> SchedulerPlan | None:
    """Return the plan with the length of the training filled in where its scheduler needs it.

    `total_steps` and `num_training_steps` are filled in by name; the texts "total_steps",
    "max_epochs" and "steps_per_epoch" as values of any argument are replaced. For a scheduler with
    the interval "epoch", a step is an epoch. Raises ConfigError if the training has no limit.
    """
    if plan is None:
        return None
    values = _length_values(plan, length)
    return replace(plan, factory=_complete_factory(plan.factory, values, values["total_steps"]))


def _length_values(plan: SchedulerPlan, length: TrainingLength) -> dict[str, int]:
    """Return the numbers that `LENGTH_NAMES` stand for."""
    total = length.total_steps if plan.interval == "step" else length.total_epochs
    return {
        "total_steps": -(-total // plan.frequency) if total != -1 else -1,
        "max_epochs": length.total_epochs,
        "steps_per_epoch": length.steps_per_epoch,
    }


def check_schedule(spec: Any, optimizer: Optimizer | None, max_epochs: int, max_steps: int) -> None:
    """Raise ConfigError for a schedule that no training of this length can use.

    Schedulers of torch and of this module are built for `optimizer` (None: it is not known) and
    stepped; of those of others, only the names of the arguments are checked. `max_*` is -1 without
    a limit. The number of steps in an epoch is not known: a warm-up may still be too long.
    """
    plan = scheduler_plan(spec)
    if plan is None:
        return
    _check_required_arguments(plan.factory)
    if optimizer is None or not _has_known_products(plan.factory):
        return
    length = TrainingLength(MANY_STEPS if plan.interval == "step" else 1, max_epochs, max_steps)
    completed = _complete_factory(plan.factory, _length_values(plan, length), num_steps=None)

    def use(subject: Optimizer) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the steps of the optimizer
            scheduler = completed(subject)
            for _ in range(2):
                metric = (0.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()
                scheduler.step(*metric)

    named_factory = getattr(plan.factory, "outer", plan.factory)
    explain_errors(use, "scheduler", named_factory=named_factory)(optimizer)


def _check_required_arguments(factory: Any) -> None:
    """Raise ConfigError for a missing argument, or one of another type in torch's schedulers."""
    if isinstance(factory, SchedulerChain):
        for part in factory.parts:
            _check_required_arguments(part)
        return
    product, arguments = _product(factory), _keyword_arguments(factory)
    name = getattr(product, "__name__", type(product).__name__)
    if isinstance(product, type) and not hasattr(product, "step"):
        raise ConfigError(f"the scheduler is a {name}; expected one of torch.optim.lr_scheduler.")
    signature = get_signature(product)
    if signature is None:
        return
    lengths = dict.fromkeys(_missing_lengths(factory))
    positional = getattr(factory, "args", ())
    try:
        signature.bind(None, *positional, **{**arguments, **lengths})
    except TypeError as error:
        text = f"the scheduler {name}: {error}; set it in the scheduler's configuration."
        raise ConfigError(text) from error
    if _is_known(product):
        numbers = {k: v for k, v in arguments.items() if v not in LENGTH_NAMES}
        check_types(product, numbers)
        for argument in PERIODS & set(numbers):
            check_count(f"{argument} of {name}", numbers[argument])


def _has_known_products(factory: Any) -> bool:
    """Whether the code of all schedulers is torch's or qtorch's."""
    if isinstance(factory, SchedulerChain):
        return all(map(_has_known_products, (factory.outer, *factory.parts)))
    return _is_known(_product(factory))


def _is_known(product: Any) -> bool:
    return str(getattr(product, "__module__", "")) in (torch.optim.lr_scheduler.__name__, __name__)


def _complete_factory(
    factory: Callable[..., Any], values: Mapping[str, int], num_steps: int | None
) -> Any:
    """Fill in the lengths of `values`; `num_steps` is None as long as they are not the real ones.

    The real ones are in the messages of the factory's errors.
    """
    if isinstance(factory, SchedulerChain):
        parts = tuple(_complete_factory(part, values, num_steps) for part in factory.parts)
        chain = replace(factory, parts=parts)
        return chain if num_steps is None else explain_errors(chain, "scheduler")
    arguments = {
        name: values[value]
        for name, value in _keyword_arguments(factory).items()
        if isinstance(value, str) and value in LENGTH_NAMES
    } | dict.fromkeys(_missing_lengths(factory), values["total_steps"])
    if -1 in arguments.values():
        raise ConfigError(
            "the scheduler needs the number of steps, but the training has no end: set "
            "trainer.max_epochs or trainer.max_steps."
        )
    if num_steps is not None:
        if _product(factory) is OneCycleLR:
            _check_one_cycle({**_keyword_arguments(factory), **arguments}, num_steps)
        factory = explain_errors(factory, "scheduler")
    return partial(factory, **arguments) if arguments else factory


def _check_one_cycle(arguments: Mapping[str, Any], num_steps: int) -> None:
    """Raise ConfigError for a cycle that is shorter than the training, where torch would fail."""
    length = arguments.get("total_steps")
    if length is None:
        length = arguments["epochs"] * arguments["steps_per_epoch"]
    if length < num_steps:
        raise ConfigError(
            f"the cycle of OneCycleLR has {length} steps, but the training has up to {num_steps}: "
            "leave out its total_steps (or epochs and steps_per_epoch), which are then filled in."
        )


def check_scheduler(scheduler: Any, plan: SchedulerPlan, *, has_validation: bool) -> None:
    """Raise ConfigError for a scheduler that waits for a metric of the validation without one."""
    if (
        isinstance(scheduler, ReduceLROnPlateau)
        and plan.metric.startswith("valid/")
        and not has_validation
    ):
        raise ConfigError(
            f"the scheduler monitors {plan.metric!r}, but there is no validation: add a segment "
            "'valid' (and remove limit_val_batches=0), or monitor train_loss."
        )


def depends_on_length(plan: SchedulerPlan | None) -> bool:
    """Whether another length of the training changes the learning rates of its first steps."""
    return plan is not None and _is_filled_in(plan.factory)


def _is_filled_in(factory: Any) -> bool:
    if isinstance(factory, SchedulerChain):
        return any(map(_is_filled_in, factory.parts))
    values = _keyword_arguments(factory).values()
    names = [v for v in values if isinstance(v, str) and v in LENGTH_NAMES]
    return bool(names or _missing_lengths(factory))


def _counts_steps(factory: Callable[..., Any]) -> bool:
    """Whether a schedule covers a number of optimizer steps."""
    if isinstance(factory, SchedulerChain):
        return any(_counts_steps(part) for part in factory.parts)
    values = _keyword_arguments(factory).values()
    return bool(_length_arguments(factory)) or any(name in values for name in STEP_NAMES)


def _product(factory: Any) -> Any:
    """Return what a factory calls: for a configuration, the class of the scheduler."""
    return getattr(factory, "func", factory)


def _keyword_arguments(factory: Any) -> dict[str, Any]:
    return dict(factory.keywords) if isinstance(factory, partial) else {}


def _missing_lengths(factory: Any) -> list[str]:
    """Return the names of the arguments that have to be filled in."""
    arguments = _keyword_arguments(factory)
    if {"epochs", "steps_per_epoch"} <= set(arguments):
        return []  # OneCycleLR multiplies them
    return [n for n in _length_arguments(factory) if arguments.get(n) is None]


def _length_arguments(factory: Any) -> list[str]:
    """Return the names of a scheduler's arguments that are a number of optimizer steps."""
    try:
        parameters = inspect.signature(_product(factory)).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in LENGTH_ARGUMENTS if name in parameters]


class WarmupCosine(LambdaLR):
    """Increase the learning rate linearly, then decrease it along a cosine.

    `warmup`: the number of steps of the increase, or their fraction of `total_steps` (a float).
    `final`: the last learning rate, as a fraction of the optimizer's. `total_steps` is filled in
    from the training. After Goyal et al. 2017 (warm-up) and Loshchilov and Hutter 2017 (cosine).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: int | float = 0.05,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        num_warmup = warmup if isinstance(warmup, int) else round(warmup * total_steps)
        if num_warmup < 0:
            raise ValueError(f"warmup is {warmup}; expected at least 0.")
        if num_warmup >= total_steps:
            raise ValueError(f"warmup is {num_warmup} of {total_steps} steps.")

        def factor(step: int) -> float:
            if step < num_warmup:
                return (step + 1) / (num_warmup + 1)
            progress = min(1.0, (step - num_warmup) / (total_steps - num_warmup))
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor, last_epoch)
