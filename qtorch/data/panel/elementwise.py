"""Element-wise operations with one parameter set per column, applied when a batch is gathered.

Writing a fitted z-score, a clip or a fill would copy the whole panel. An `Elementwise` holds a
few numbers per column and is applied to `[B, T, F]` after the gather.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from qtorch.core.errors import ArgumentError, DataError

Number = float | Tensor


class Elementwise(ABC):
    """One operation; its parameters are tensors `[K]`, one value for each of K columns.

    Subclasses are immutable. `neutral` holds the parameters that leave a value unchanged, so that
    an operation on some columns can be widened to all of them.
    """

    parameters: tuple[Tensor, ...]
    neutral: tuple[float, ...]

    def __init__(self, *parameters: Number) -> None:
        tensors = [torch.as_tensor(p, dtype=torch.float32).reshape(-1) for p in parameters]
        self.parameters = _broadcast(tensors)
        self._common_values = [_common_value(p) for p in self.parameters]

    @abstractmethod
    def apply_(self, x: Tensor) -> Tensor:
        """Apply the operation to `x [..., K]`; `x` may be overwritten."""

    def num_columns(self) -> int:
        """Return K, or 1 if one parameter set serves every column."""
        return self.parameters[0].numel()

    def expand(self, num_columns: int) -> Self:
        """Return the operation with parameters for exactly `num_columns` columns."""
        if self.num_columns() == num_columns:
            return self
        if self.num_columns() != 1:
            raise ArgumentError(
                f"{type(self).__name__} has parameters for {self.num_columns()} columns, but "
                f"got {num_columns} columns."
            )
        return self._with_parameters(tuple(p.expand(num_columns) for p in self.parameters))

    def reindex(self, positions: Sequence[int | None]) -> Self:
        """Rearrange the parameters: new column j takes those of `positions[j]`, None is neutral."""
        index = torch.tensor([-1 if p is None else p for p in positions])
        parameters = tuple(
            torch.where(index < 0, torch.tensor(neutral), p[index.clamp(min=0)])
            for p, neutral in zip(self.parameters, self.neutral, strict=True)
        )
        return self._with_parameters(parameters)

    def reshape_for_windows(self, num_steps: int) -> Self:
        """Rearrange field-major columns (`F * num_steps`) for windows `[.., num_steps, F]`."""
        return self._with_parameters(
            tuple(p.view(-1, num_steps).t().contiguous() for p in self.parameters)
        )

    def to(self, device: torch.device) -> Self:
        """Return the operation with its parameters on another device."""
        return self._with_parameters(tuple(p.to(device) for p in self.parameters))

    def _with_parameters(self, parameters: tuple[Tensor, ...]) -> Self:
        operation = object.__new__(type(self))
        operation.parameters = parameters
        # Read once, here: reading a GPU tensor's value in `apply_` would synchronize the device.
        operation._common_values = [_common_value(p) for p in parameters]
        return operation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_columns()} columns)"


class Affine(Elementwise):
    """Scale a value: `(x - center) / scale`."""

    neutral = (0.0, 1.0)

    def __init__(self, center: Number, scale: Number = 1.0) -> None:
        super().__init__(center, scale)

    def apply_(self, x: Tensor) -> Tensor:
        center, scale = self.parameters
        # Subtract, then divide, as Qlib does: a reciprocal would differ in the last bit.
        return x.sub_(center).div_(scale)


class Clip(Elementwise):
    """Limit `x` to `low .. high`; NaN stays NaN, an infinity becomes the limit."""

    neutral = (-float("inf"), float("inf"))

    def __init__(self, low: Number, high: Number) -> None:
        super().__init__(low, high)

    def apply_(self, x: Tensor) -> Tensor:
        low, high = self._common_values
        if low is not None and high is not None:
            return x.clamp_(low, high)
        return x.clamp_(self.parameters[0], self.parameters[1])


class FillNaN(Elementwise):
    """Replace NaN by a constant."""

    neutral = (float("nan"),)

    def __init__(self, value: Number = 0.0) -> None:
        super().__init__(value)

    def apply_(self, x: Tensor) -> Tensor:
        value = self._common_values[0]
        if value is not None:
            return x.nan_to_num_(nan=value, posinf=float("inf"), neginf=-float("inf"))
        return torch.where(x.isnan(), self.parameters[0], x)


class Tanh(Elementwise):
    """Compute `tanh(x)`."""

    neutral = (0.0,)

    def __init__(self) -> None:
        super().__init__(1.0)

    def apply_(self, x: Tensor) -> Tensor:
        if self._common_values[0] == 1.0:
            return x.tanh_()
        return torch.where(self.parameters[0] > 0, x.tanh(), x)


def _broadcast(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    length = max((p.numel() for p in parameters), default=0)
    for p in parameters:
        if p.numel() not in (1, length):
            raise ArgumentError(f"got parameters for {p.numel()} and for {length} columns.")
    return tuple(p.expand(length) for p in parameters)


def _common_value(parameter: Tensor) -> float | None:
    """Return the value that all columns share, or None."""
    values = parameter.flatten()
    if not values.numel():
        return None
    is_equal = (values == values[0]) | (values.isnan() & values[0].isnan())
    return float(values[0]) if bool(is_equal.all()) else None


class Chain:
    """A sequence of operations, each on named columns; immutable."""

    def __init__(self, steps: Sequence[tuple[tuple[str, ...], Elementwise]] = ()) -> None:
        self.steps = tuple(steps)

    def __len__(self) -> int:
        return len(self.steps)

    def with_operation(self, names: Sequence[str], operation: Elementwise) -> Chain:
        """Return this chain with one more operation at the end."""
        if len(set(names)) != len(names):
            raise DataError(f"column names must be unique, got {list(names)[:8]}.")
        return Chain([*self.steps, (tuple(names), operation.expand(len(names)))])

    def drop(self, names: Sequence[str]) -> Chain:
        """Return this chain without operations on these columns, because they were rewritten."""
        dropped_names = set(names)
        steps: list[tuple[tuple[str, ...], Elementwise]] = []
        for step_names, operation in self.steps:
            positions = [k for k, name in enumerate(step_names) if name not in dropped_names]
            if len(positions) == len(step_names):
                steps.append((step_names, operation))
            elif positions:
                steps.append(
                    (tuple(step_names[k] for k in positions), operation.reindex(positions))
                )
        return Chain(steps)

    def compile(self, names: Sequence[str], device: torch.device | None = None) -> FusedChain:
        """Bind the chain to values whose last dimension is exactly `names`."""
        stages = []
        for step_names, operation in self.steps:
            position_by_name = {name: k for k, name in enumerate(step_names)}
            if not any(name in position_by_name for name in names):
                continue
            stages.append(
                operation
                if tuple(names) == step_names
                else operation.reindex([position_by_name.get(name) for name in names])
            )
        return FusedChain([s if device is None else s.to(device) for s in stages])


class FusedChain:
    """A chain that is bound to columns; call it with `x [..., F]`."""

    def __init__(self, stages: Sequence[Elementwise] = ()) -> None:
        self.stages = tuple(stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply every operation to `x [..., F]`; `x` may be overwritten, so pass a copy."""
        for stage in self.stages:
            x = stage.apply_(x)
        return x

    def to(self, device: torch.device) -> FusedChain:
        """Return the operations with their parameters on another device."""
        return FusedChain([s.to(device) for s in self.stages])
