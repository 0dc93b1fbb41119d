"""Optimizers that update the weights of all members at once, each with hyperparameters of its own.

They compute what torch's optimizers of the same name do, with a factor for each member in place of
a number: torch's fused kernels take a single learning rate. A member's numbers depend on its own
row only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam

from qtorch.model.fleet.stack import Layout

STEPS = "steps"  # the moment that counts a member's steps, [M, 1]


class StackedOptimizer(ABC):
    """One optimizer step of K members: `weights [K, P]` by their gradients `[K, P]`.

    `templates` are torch's optimizers, one a member, whose parameter groups hold that member's
    hyperparameters; schedulers change them there, and `read_hyperparameters` copies them.
    """

    names: ClassVar[tuple[str, ...]]  # the hyperparameters that differ between members
    fixed: ClassVar[tuple[str, ...]] = ()  # those that must be equal
    unsupported: ClassVar[tuple[str, ...]] = ("maximize", "differentiable", "capturable")

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self._last_values: list[list[Any]] = []
        self.factors: dict[str, Tensor] = {}

    @classmethod
    @abstractmethod
    def moments(cls, num_weights: int, template: Optimizer) -> dict[str, int]:
        """Return the names and widths of the moments, for P weights."""

    @abstractmethod
    def step(
        self,
        weights: Tensor,
        gradients: Tensor,
        moments: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
    ) -> None:
        """Update `weights [K, P]` and the moments in place; `factors` are `[K, 1]` or `[K, P]`."""

    @classmethod
    def refusal(cls, template: Optimizer) -> str | None:
        """Say why members with this optimizer cannot be trained together; None if they can."""
        for group in template.param_groups:
            for name in cls.unsupported:
                if group.get(name):
                    return f"{type(template).__name__} with {name}"
        return None

    @classmethod
    def signature(cls, template: Optimizer) -> tuple[Any, ...]:
        """Return what must be equal in all members."""
        groups = template.param_groups
        return (cls.__name__, *(tuple(group.get(n) for n in cls.fixed) for group in groups))

    def read_hyperparameters(self, templates: Sequence[Optimizer], columns: list[Tensor]) -> None:
        """Read the members' hyperparameters anew.

        `columns`: for each parameter group of a template, the columns `[P_group]` of its weights.
        Nothing is copied to the device if no value has changed.
        """
        values = [
            [[_read(group, name) for group in t.param_groups] for name in self.names]
            for t in templates
        ]
        if values == self._last_values:
            return
        self._last_values = values
        num_weights = sum(self.layout.sizes)
        for k, name in enumerate(self.names):
            rows = torch.tensor(
                [member[k] for member in values], dtype=torch.float64
            )  # [M, groups]
            if rows.shape[1] > 1:
                expanded = torch.empty(len(rows), num_weights, dtype=torch.float64)
                for group, places in enumerate(columns):
                    expanded[:, places] = rows[:, group, None]
                rows = expanded
            factors = rows.float()
            if self.device.type == "cuda":
                factors = factors.pin_memory().to(self.device, non_blocking=True)
            self.factors[name] = factors


class StackedSGD(StackedOptimizer):
    """`torch.optim.SGD`: momentum, dampening, Nesterov's momentum and weight decay."""

    names = ("lr", "weight_decay", "momentum", "dampening")
    fixed = ("nesterov",)

    def __init__(self, layout: Layout, device: torch.device, template: Optimizer) -> None:
        super().__init__(layout, device)
        self.nesterov = bool(template.param_groups[0].get("nesterov"))

    @classmethod
    def moments(cls, num_weights: int, template: Optimizer) -> dict[str, int]:
        return {STEPS: 1, "momentum_buffer": num_weights}

    def step(
        self,
        weights: Tensor,
        gradients: Tensor,
        moments: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
    ) -> None:
        steps, buffer = moments[STEPS], moments["momentum_buffer"]
        gradients = torch.addcmul(gradients, weights, factors["weight_decay"])
        # The first step takes the gradient itself into the buffer, without dampening.
        share = torch.where(steps == 0, 1.0, 1.0 - factors["dampening"])
        buffer.mul_(factors["momentum"]).addcmul_(gradients, share)
        steps.add_(1)
        # Without momentum the buffer is the gradient, dampened: torch does not dampen it then.
        update = torch.where(factors["momentum"] == 0, gradients, buffer)
        if self.nesterov:
            update = torch.addcmul(gradients, buffer, factors["momentum"])
        weights.addcmul_(update, -factors["lr"])


class StackedAdam(StackedOptimizer):
    """`torch.optim.Adam`, with weight decay added to the gradient."""

    names = ("lr", "weight_decay", "eps", "beta1", "beta2")
    fixed = ("amsgrad", "decoupled_weight_decay")

    def __init__(self, layout: Layout, device: torch.device, template: Optimizer) -> None:
        super().__init__(layout, device)
        group = template.param_groups[0]
        self.is_decoupled = bool(group.get("decoupled_weight_decay", False))
        self.amsgrad = bool(group.get("amsgrad"))

    @classmethod
    def moments(cls, num_weights: int, template: Optimizer) -> dict[str, int]:
        names = ["exp_avg", "exp_avg_sq"]
        if template.param_groups[0].get("amsgrad"):
            names.append("max_exp_avg_sq")
        return {STEPS: 1, **dict.fromkeys(names, num_weights)}

    def step(
        self,
        weights: Tensor,
        gradients: Tensor,
        moments: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
    ) -> None:
        if weights.device.type == "cpu" and factors["lr"].shape[1] == 1:
            self._step_rows(weights, gradients, moments, factors)
            return
        lr, decay = factors["lr"], factors["weight_decay"]
        beta1, beta2 = factors["beta1"], factors["beta2"]
        steps, mean, square = moments[STEPS], moments["exp_avg"], moments["exp_avg_sq"]
        steps.add_(1)
        if self.is_decoupled:
            weights.mul_(1.0 - lr * decay)
        else:
            gradients = torch.addcmul(gradients, weights, decay)
        mean.lerp_(gradients, (1.0 - beta1).expand_as(mean))
        square.mul_(beta2).addcmul_(gradients * (1.0 - beta2), gradients)
        largest = square
        if self.amsgrad:
            largest = torch.maximum(moments["max_exp_avg_sq"], square)
            moments["max_exp_avg_sq"].copy_(largest)
        correction1 = 1.0 - beta1.double().pow(steps.double())
        correction2 = (1.0 - beta2.double().pow(steps.double())).sqrt()
        step_size = (lr / correction1).float()
        scale = largest.sqrt().div_(correction2.float()).add_(factors["eps"])
        weights.addcdiv_(mean * -step_size, scale)

    def _step_rows(
        self,
        weights: Tensor,
        gradients: Tensor,
        moments: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
    ) -> None:
        """Update with torch's fused kernel, which passes over each row once, as a CPU likes it.

        A row is a tensor of its own, so that its numbers do not depend on the other rows.
        """
        members: dict[tuple[float, ...], list[int]] = {}
        values = torch.cat([factors[name] for name in self.names], 1).tolist()
        for row, numbers in enumerate(values):
            members.setdefault(tuple(numbers), []).append(row)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        tensors = [weights, gradients, *(moments[n] for n in names if n in moments), moments[STEPS]]
        rows = [tensor.unbind() for tensor in tensors]
        for (lr, weight_decay, eps, beta1, beta2), places in members.items():
            params, grads, means, squares, *largest, steps = (
                [each[k] for k in places] for each in rows
            )
            adam(
                params=params,
                grads=grads,
                exp_avgs=means,
                exp_avg_sqs=squares,
                max_exp_avg_sqs=largest[0] if largest else [],
                state_steps=steps,
                fused=True,
                decoupled_weight_decay=self.is_decoupled,
                amsgrad=self.amsgrad,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=weight_decay,
                eps=eps,
                maximize=False,
            )


STACKED: dict[type[Optimizer], type[StackedAdam] | type[StackedSGD]] = {
    SGD: StackedSGD,
    Adam: StackedAdam,
    AdamW: StackedAdam,
}


def _read(group: Mapping[str, Any], name: str) -> float:
    if name in ("beta1", "beta2"):
        return float(group["betas"][int(name[-1]) - 1])
    return float(group[name])
