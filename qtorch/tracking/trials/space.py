"""The search space of a hyperparameter search, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

Value = str | int | float


@dataclass(frozen=True)
class Choice:
    """A choice between values, each written as in an override."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """A number from `low` to `high`, both inclusive; whole numbers only if `integer`."""

    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float | None = None

    def grid(self) -> list[Value] | None:
        """Return all values of the range; None if it is continuous or logarithmic."""
        step = self.step if self.step is not None or not self.integer else 1
        if step is None or self.log:
            return None
        number = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + k * step for k in range(number)]
        return [int(v) for v in values] if self.integer else list(values)


Space = dict[str, Choice | Span]
