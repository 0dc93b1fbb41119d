"""What a search may choose from, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

Value = str | int | float


@dataclass(frozen=True)
class Choice:
    """One of some values, each as it is written in an override."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """A number from `low` to `high`, both included; whole ones where `integer`."""

    low: float
    high: float
    integer: bool = False
    log: bool = False
    step: float | None = None

    def grid(self) -> list[Value] | None:
        """Its values where there are countably many."""
        step = self.step if self.step is not None or not self.integer else 1
        if step is None or self.log:
            return None
        number = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + k * step for k in range(number)]
        return [int(v) for v in values] if self.integer else list(values)


Space = dict[str, Choice | Span]
