"""Build losses, optimizers and other parts of a training from their configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError, check_name, unknown_name_message
from qtorch.core.instantiate import (
    check_config,
    get_callable_kwargs,
    get_signature,
    init_instance_by_config,
    resolve_config,
)
from qtorch.core.trust import NAME_KEYS
from qtorch.metrics.loss import LOSSES, BaseLoss, Combined, FunctionLoss

Spec = str | Mapping[str, Any] | Callable[..., Any]  # a name, a configuration, or the object
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
# Those of torch with a fused implementation on CUDA.
FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TARGET_KEYS = set(NAME_KEYS)  # one of them names what a configuration builds


def build_loss(spec: Spec) -> Callable[..., Any]:
    """Build a loss from `spec`.

    `spec` is a name in `LOSSES`, a configuration, a callable (score, target) -> scalar, which may
    take `weight` and `mask` too (`metrics.loss.FunctionLoss`), a class of such callables, or a
    mapping {name: weight} for the weighted sum of several losses. A configuration names a class, a
    function that makes the loss, or a function (score, target, ...) that is the loss itself; its
    other arguments are then those of the configuration.
    """
    if isinstance(spec, str) and "." not in spec:
        check_name("loss", spec, LOSSES)
        return LOSSES[spec]()
    if isinstance(spec, Mapping) and not TARGET_KEYS & set(spec):
        return _build_combined_loss(spec)
    loss: Any = spec
    if isinstance(spec, str | Mapping):
        loss = _find_loss_function(spec) or init_instance_by_config(spec)
    if isinstance(loss, type):
        loss = init_instance_by_config({"class": loss})
    if isinstance(loss, BaseLoss):
        return loss
    if not callable(loss):
        raise ConfigError(f"the loss is a {type(loss).__name__}, which is not callable.")
    return _build_function_loss(loss)


def _find_loss_function(spec: str | Mapping[Any, Any]) -> Callable[..., Any] | None:
    """Return the function that is a loss itself, with its configured arguments; None if none is.

    Its first two arguments, score and target, have no default value.
    """
    if isinstance(spec, str) and spec.startswith("file:"):
        return None  # a pickle
    target, arguments = get_callable_kwargs(spec)
    if not inspect.isfunction(target) or "_args_" in spec:
        return None
    first_two = list(inspect.signature(target).parameters.values())[:2]
    are_free = [
        p.kind in POSITIONAL and p.default is p.empty and p.name not in arguments for p in first_two
    ]
    if are_free != [True, True]:
        return None
    check_config(spec)
    return partial(target, **arguments) if arguments else target


def _build_function_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Check how a user's own loss is called, and make one with `weight` or `mask` a BaseLoss."""
    signature = get_signature(loss.forward if isinstance(loss, nn.Module) else loss)
    if signature is None:
        return loss
    function = loss.func if isinstance(loss, partial) else loss
    is_of_torch = str(getattr(function, "__module__", "")).startswith(
        "torch."
    )  # its `weight` means classes
    names = () if is_of_torch else ("weight", "mask")
    keywords = [name for name in names if name in signature.parameters]
    try:
        signature.bind("score", "target", **dict.fromkeys(keywords))
    except TypeError as error:
        name = getattr(function, "__name__", type(loss).__name__)
        raise ConfigError(
            f"the loss {name}{signature} cannot be called with (score, target): {error}. A loss "
            "takes the scores and the labels of a batch, and weight and mask if it has arguments "
            "of these names, and returns a scalar."
        ) from error
    _check_result(loss, keywords)
    return FunctionLoss(loss, keywords) if keywords else loss


def _check_result(loss: Callable[..., Any], keywords: Sequence[str]) -> None:
    """Raise ConfigError if a loss of a few samples is no scalar that depends on their scores.

    A loss that fails on them may need more samples, or whole days.
    """
    score = torch.linspace(-1, 1, 8, requires_grad=True)
    ones = {"weight": torch.ones(8), "mask": torch.ones(8, dtype=torch.bool)}
    with torch.random.fork_rng(devices=[]):
        try:
            result = copy.deepcopy(loss)(
                score, torch.linspace(1, 2, 8), **{name: ones[name] for name in keywords}
            )
        except Exception:  # any error of the user's code; the training raises it if it stays
            return
    if not isinstance(result, torch.Tensor):
        fault = f"a {type(result).__name__}; expected a tensor"
    elif result.numel() != 1:
        fault = f"a tensor of shape {list(result.shape)}; expected the mean of the batch"
    elif not result.requires_grad:
        fault = "a tensor without a gradient; expected one that is computed from the scores"
    else:
        return
    name = getattr(loss, "__name__", type(loss).__name__)
    raise ConfigError(f"the loss {name} returns {fault}.")


def _build_combined_loss(spec: Mapping[Any, Any]) -> Combined:
    """Build a weighted sum of losses.

    `spec` is `{"mse": 1.0, "ic": 0.5}`, or `{any name: {"loss": ..., "weight": ...}}`.
    """
    parts = []
    for name, part in spec.items():
        part_spec = part if isinstance(part, Mapping) else {"loss": name, "weight": part}
        if set(part_spec) - {"loss", "weight"} or "loss" not in part_spec:
            raise ConfigError(
                f"the loss {name!r} is {dict(part_spec)}; expected a weight, or "
                "{'loss': ..., 'weight': ...}."
            )
        loss, weight = build_loss(part_spec["loss"]), part_spec.get("weight", 1.0)
        if not isinstance(loss, BaseLoss):
            raise ConfigError(
                f"the loss {name!r} cannot be part of a sum; derive it from qtorch.metrics.Loss "
                "(single samples) or qtorch.metrics.DayLoss (whole days)."
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"the weight of the loss {name!r} is {weight!r}, not a number.")
        parts.append((loss, float(weight)))
    return Combined(parts)


def optimizer_factory(spec: Spec | None) -> OptimizerFactory:
    """Return a factory parameters -> optimizer.

    `spec` is None (Adam with lr 1e-3), the name of an optimizer in torch.optim, a configuration
    without `params`, its arguments alone (`{"lr": 1e-4}`, for Adam), or a callable. For parameters
    with other arguments see `group_parameters`.
    """
    if spec is None:
        return partial(torch.optim.Adam, lr=1e-3)
    if isinstance(spec, Mapping) and not TARGET_KEYS & set(spec):
        return build_factory({"_target_": "torch.optim.Adam", "lr": 1e-3, **spec}, "optimizer")
    if isinstance(spec, str) and "." not in spec:
        optimizers = {
            name: value
            for name, value in vars(torch.optim).items()
            if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
        }
        for name, optimizer_class in optimizers.items():
            if name.lower() == spec.lower():
                if optimizer_class is torch.optim.LBFGS:  # its fixed steps of length 1 diverge
                    return partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")
                return cast(OptimizerFactory, optimizer_class)
        raise ConfigError(unknown_name_message("optimizer", spec, optimizers))
    return build_factory(spec, "optimizer")


def check_optimizer(spec: Spec | None) -> Optimizer | None:
    """Raise ConfigError for an optimizer whose name or arguments are wrong.

    `spec` is one of `group_parameters`, whose patterns are not checked. Returns the optimizer of
    one weight; None if a function builds it, which is not called.
    """
    groups: Mapping[str, Any] = {}
    if isinstance(spec, Mapping) and "groups" in spec:
        groups, spec = spec["groups"] or {}, spec.get("optimizer")
    factory = optimizer_factory(spec)
    product_class = getattr(factory, "func", factory)
    if not isinstance(product_class, type):
        return None
    if not issubclass(product_class, Optimizer):
        raise ConfigError(
            f"the optimizer is a {product_class.__name__}; expected a torch.optim.Optimizer."
        )
    optimizer = explain_errors(factory)([nn.Parameter(torch.zeros(1))])
    for pattern, arguments in groups.items():
        if not isinstance(arguments, Mapping):
            raise ConfigError(
                f"optimizer.groups: {pattern!r} has {arguments!r:.60}; expected a mapping of "
                "arguments, such as {weight_decay: 0.0}."
            )
        for name in arguments:  # torch would keep an unknown one, unread
            kind = f"argument of {product_class.__name__} in the group {pattern!r}:"
            check_name(kind, name, optimizer.defaults)
    assert isinstance(optimizer, Optimizer)
    return optimizer


def fuse_on_gpu(factory: OptimizerFactory) -> OptimizerFactory:
    """Wrap the factory of an optimizer to update all weights on a GPU by one fused operation.

    Only for optimizers of torch that have it, and unless the user has chosen `fused`, `foreach`,
    `capturable` or `differentiable`. The other implementations start several operations each step.
    A fused optimizer itself skips a step whose float16 gradients are infinite, so that the
    GradScaler need not read them.
    """

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = factory(parameters)
        groups = optimizer.param_groups
        if type(optimizer) in FUSED_OPTIMIZERS and all(_can_fuse(group) for group in groups):
            for group in groups:
                group["fused"] = True
            # torch sets this for an optimizer that is built with fused=True.
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # not in the stubs
        return optimizer

    return make


def _can_fuse(group: Mapping[str, Any]) -> bool:
    is_chosen = group.get("fused") is not None or group.get("foreach") is not None
    is_special = group.get("capturable") or group.get("differentiable")
    return not (is_chosen or is_special) and all(
        p.is_cuda and p.is_floating_point() for p in group["params"]
    )


def explain_errors(
    factory: Callable[..., Any], kind: str = "optimizer", *, named_factory: Any = None
) -> Callable[..., Any]:
    """Wrap the factory of an optimizer to raise ConfigError for a bad argument (text for lr).

    `named_factory`: the one whose name and arguments are in the message, if it is another.
    """

    def make(subject: Any, **lengths: Any) -> Any:
        try:
            return factory(subject, **lengths)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            described = factory if named_factory is None else named_factory
            product_class = getattr(described, "func", described)
            arguments = {**getattr(described, "keywords", {}), **lengths}
            name = getattr(product_class, "__name__", type(product_class).__name__)
            raise ConfigError(f"the {kind} {name} does not accept {arguments}: {error}") from error

    return make


def group_parameters(spec: Spec | None, network: nn.Module) -> OptimizerFactory:
    """Return an optimizer factory; parameters may have arguments of their own, by their names.

    `spec` is one of `optimizer_factory`, or a mapping with `optimizer` (such a spec) and `groups`:
    `{"*.bias": {"weight_decay": 0.0}}`. The first pattern that a name matches counts. Raises
    ConfigError for a pattern that matches no parameter.
    """
    if not isinstance(spec, Mapping) or "groups" not in spec:
        return optimizer_factory(spec)
    for name in spec:
        check_name("option of optimizer", name, ("optimizer", "groups"))
    factory, groups = optimizer_factory(spec.get("optimizer")), dict(spec["groups"] or {})
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for pattern in groups:
        if not any(fnmatch(name, pattern) for name in names.values()):
            raise ConfigError(
                f"optimizer.groups: {pattern!r} matches no parameter; the names are "
                f"{list(names.values())}."
            )

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        members: dict[str | None, list[nn.Parameter]] = {None: [], **{p: [] for p in groups}}
        for parameter in parameters:
            name = names.get(id(parameter), "")
            pattern = next((p for p in groups if name and fnmatch(name, p)), None)
            members[pattern].append(parameter)
        all_groups = [
            {"params": part, **({} if pattern is None else groups[pattern])}
            for pattern, part in members.items()
            if part
        ]
        return factory(all_groups)  # type: ignore[arg-type]  # torch takes groups as well

    return make


def with_learning_rate(spec: Spec | None, lr: float | None) -> Spec | None:
    """Return an optimizer's specification with another learning rate (None: unchanged)."""
    if lr is None:
        return spec
    if isinstance(spec, Mapping) and "groups" in spec:
        return {**spec, "optimizer": with_learning_rate(spec.get("optimizer"), lr)}
    return partial(cast(Any, optimizer_factory(spec)), lr=lr)


def build_factory(spec: Any, kind: str) -> Callable[..., Any]:
    """Return a factory from a name or a partial configuration.

    The remaining arguments are passed to the factory later. `kind` ("optimizer", "scheduler", ...)
    is used in error messages.
    """
    spec = resolve_config(spec)
    if isinstance(spec, str):
        spec = {"_target_": spec}
    if isinstance(spec, Mapping):
        if not TARGET_KEYS & set(spec):
            raise ConfigError(
                f"the {kind} is configured with {sorted(spec)}; expected "
                f"{{'_target_': 'package.module.Class', ...}}."
            )
        if "_target_" not in spec:
            target, arguments = get_callable_kwargs(spec)
            spec = {"_target_": target, **arguments}
        spec = init_instance_by_config({**spec, "_partial_": True})
    if not callable(spec):
        raise ConfigError(
            f"the {kind} is a {type(spec).__name__}; expected a configuration or a callable that "
            "builds one."
        )
    return spec  # type: ignore[no-any-return]  # callable() does not narrow the return type


def component_list(value: Any) -> list[Any]:
    """Return the components (callbacks, loggers) of a configuration as a list.

    `value` is None, a component, a list of them, or a mapping of names to components, in which None
    leaves one out.
    """
    value = resolve_config(value)
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, Mapping) and not TARGET_KEYS & set(value):
        value = list(value.values())
    components = list(value) if isinstance(value, list | tuple) else [value]
    return [component for component in components if component is not None]
