"""Operations on single values with one parameter set a column, applied when a batch is gathered.

A fitted z-score, a clip or a fill would copy the whole panel if it were written; as an
`Elementwise` it is a few numbers a column and is applied to `[B, T, F]` after the gather.
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

    Subclasses are immutable and say what leaves a value unchanged (`neutral`), so that an
    operation on some columns can be widened to all of them.
    """

    parameters: tuple[Tensor, ...]
    neutral: tuple[float, ...]

    def __init__(self, *parameters: Number) -> None:
        shaped = [torch.as_tensor(p, dtype=torch.float32).reshape(-1) for p in parameters]
        self.parameters = _broadcast(shaped)
        self._same = [_single(p) for p in self.parameters]

    @abstractmethod
    def apply_(self, x: Tensor) -> Tensor:
        """`x [..., K]` with the operation applied; `x` may be overwritten."""

    def num_columns(self) -> int:
        """K, or 1 where one parameter set serves every column."""
        return self.parameters[0].numel()

    def expand(self, num_columns: int) -> Self:
        """The same operation with parameters for exactly `num_columns` columns."""
        if self.num_columns() == num_columns:
            return self
        if self.num_columns() != 1:
            raise ArgumentError(
                f"{type(self).__name__} has parameters for {self.num_columns()} columns, but "
                f"{num_columns} columns were given."
            )
        return self._with(tuple(p.expand(num_columns) for p in self.parameters))

    def spread(self, positions: Sequence[int | None]) -> Self:
        """Parameters for new columns: column j takes those of `positions[j]`, None is neutral."""
        chosen = torch.tensor([-1 if p is None else p for p in positions])
        taken = tuple(
            torch.where(chosen < 0, torch.tensor(neutral), p[chosen.clamp(min=0)])
            for p, neutral in zip(self.parameters, self.neutral, strict=True)
        )
        return self._with(taken)

    def windowed(self, num_steps: int) -> Self:
        """Parameters of field-major columns (`F * num_steps`) for windows `[.., num_steps, F]`."""
        return self._with(tuple(p.view(-1, num_steps).t().contiguous() for p in self.parameters))

    def to(self, device: torch.device) -> Self:
        """The same operation for values on another device."""
        return self._with(tuple(p.to(device) for p in self.parameters))

    def _with(self, parameters: tuple[Tensor, ...]) -> Self:
        other = object.__new__(type(self))
        other.parameters = parameters
        # Read here, once: reading a device's number in `apply_` would stop the device.
        other._same = [_single(p) for p in parameters]
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_columns()} columns)"


class Affine(Elementwise):
    """`(x - center) / scale`."""

    neutral = (0.0, 1.0)

    def __init__(self, center: Number, scale: Number = 1.0) -> None:
        super().__init__(center, scale)

    def apply_(self, x: Tensor) -> Tensor:
        center, scale = self.parameters
        # Subtract, then divide, as Qlib does: a reciprocal would differ in the last place.
        return x.sub_(center).div_(scale)


class Clip(Elementwise):
    """`x` limited to `low .. high`; NaN stays NaN, inf becomes the limit."""

    neutral = (-float("inf"), float("inf"))

    def __init__(self, low: Number, high: Number) -> None:
        super().__init__(low, high)

    def apply_(self, x: Tensor) -> Tensor:
        low, high = self._same
        if low is not None and high is not None:
            return x.clamp_(low, high)
        return x.clamp_(self.parameters[0], self.parameters[1])


class FillNaN(Elementwise):
    """A constant in the place of NaN."""

    neutral = (float("nan"),)

    def __init__(self, value: Number = 0.0) -> None:
        super().__init__(value)

    def apply_(self, x: Tensor) -> Tensor:
        value = self._same[0]
        if value is not None:
            return x.nan_to_num_(nan=value, posinf=float("inf"), neginf=-float("inf"))
        return torch.where(x.isnan(), self.parameters[0], x)


class ReplaceInf(Elementwise):
    """`value` (NaN by default) in the place of both infinities."""

    neutral = (float("inf"), -float("inf"))

    def __init__(self, value: Number = float("nan"), negative: Number | None = None) -> None:
        super().__init__(value, value if negative is None else negative)

    def apply_(self, x: Tensor) -> Tensor:
        positive, negative = self._same
        if positive is not None and negative is not None:
            return x.nan_to_num_(nan=float("nan"), posinf=positive, neginf=negative)
        x = torch.where(x == float("inf"), self.parameters[0], x)
        return torch.where(x == -float("inf"), self.parameters[1], x)


class Tanh(Elementwise):
    """`tanh(x)`."""

    neutral = (0.0,)

    def __init__(self) -> None:
        super().__init__(1.0)

    def apply_(self, x: Tensor) -> Tensor:
        if self._same[0] == 1.0:
            return x.tanh_()
        return torch.where(self.parameters[0] > 0, x.tanh(), x)


def _broadcast(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    length = max((p.numel() for p in parameters), default=0)
    for p in parameters:
        if p.numel() not in (1, length):
            raise ArgumentError(f"parameters for {p.numel()} and for {length} columns were given.")
    return tuple(p.expand(length) for p in parameters)


def _single(parameter: Tensor) -> float | None:
    """The value that all columns share, if they do."""
    values = parameter.flatten()
    if not values.numel():
        return None
    same = (values == values[0]) | (values.isnan() & values[0].isnan())
    return float(values[0]) if bool(same.all()) else None


class Chain:
    """Operations in order, each on named columns; immutable."""

    def __init__(self, steps: Sequence[tuple[tuple[str, ...], Elementwise]] = ()) -> None:
        self.steps = tuple(steps)

    def __len__(self) -> int:
        return len(self.steps)

    def then(self, names: Sequence[str], operation: Elementwise) -> Chain:
        """This chain with one more operation behind it."""
        if len(set(names)) != len(names):
            raise DataError(f"a column is named twice in {list(names)[:8]}.")
        return Chain([*self.steps, (tuple(names), operation.expand(len(names)))])

    def without(self, names: Sequence[str]) -> Chain:
        """This chain with nothing left for these columns (they are newly written)."""
        gone = set(names)
        steps: list[tuple[tuple[str, ...], Elementwise]] = []
        for owners, operation in self.steps:
            kept = [k for k, name in enumerate(owners) if name not in gone]
            if len(kept) == len(owners):
                steps.append((owners, operation))
            elif kept:
                steps.append((tuple(owners[k] for k in kept), operation.spread(kept)))
        return Chain(steps)

    def compile(self, names: Sequence[str], device: torch.device | None = None) -> Fused:
        """The chain for values whose last dimension is exactly `names`."""
        stages = []
        for owners, operation in self.steps:
            place = {name: k for k, name in enumerate(owners)}
            if not any(name in place for name in names):
                continue
            stages.append(
                operation
                if tuple(names) == owners
                else operation.spread([place.get(name) for name in names])
            )
        return Fused([s if device is None else s.to(device) for s in stages])


class Fused:
    """A chain bound to columns: `fused(x [..., F])`."""

    def __init__(self, stages: Sequence[Elementwise] = ()) -> None:
        self.stages = tuple(stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., F]` with every operation applied; `x` may be overwritten: hand over a copy."""
        for stage in self.stages:
            x = stage.apply_(x)
        return x

    def to(self, device: torch.device) -> Fused:
        """The same operations for values on another device."""
        return Fused([s.to(device) for s in self.stages])
