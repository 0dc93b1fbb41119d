"""User-defined classes that the tests store."""

from __future__ import annotations

import torch

from qtorch.core.serial import State


class Counter:
    """Can only be pickled."""

    def __init__(self, count: int) -> None:
        self.count = count


class Plan:
    """Stored with `to_state` and `from_state`."""

    def __init__(self, steps: tuple, weights: list[float] | None = None) -> None:
        self.steps = steps
        self.weights = None if weights is None else torch.tensor(weights)

    def to_state(self) -> State:
        tensors = {} if self.weights is None else {"weights": self.weights}
        return State({"steps": self.steps}, tensors)

    @classmethod
    def from_state(cls, state: State) -> Plan:
        weights = state.tensors.get("weights")
        return cls(state.config["steps"], None if weights is None else weights.tolist())
