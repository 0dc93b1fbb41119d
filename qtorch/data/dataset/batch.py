"""The batch: the tensors of the samples of one training or scoring step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Batch:
    """The samples of one step; day batches have `[G, N, ...]` in place of `[B, ...]`.

    `x [B, T, F]` float32; `y [B, Q]` the processed labels; `weight [B]`; `mask [B]` bool, False
    for padding (None: every row is a sample); `date [B]` calendar rows and `instrument [B]`
    columns, int64; `extra` named tensors, including `raw_label [B, Q]` if it is available.
    Padded rows have x 0, weight 0 and NaN in y and raw_label, so that a loss or metric that
    ignores the mask fails visibly.

    If several ranks share a batch, `global_size` counts the rows (days) of all ranks. `is_dummy`
    marks the dummy batch of a rank that has no share: its labels are NaN, and it only keeps the
    rank in step with the others.
    """

    x: Tensor
    date: Tensor
    instrument: Tensor
    y: Tensor | None = None
    weight: Tensor | None = None
    mask: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    num_samples: int = 0
    global_size: int = 0
    is_dummy: bool = False

    def __post_init__(self) -> None:
        self.num_samples = self.num_samples or self.date.numel()

    @property
    def is_day(self) -> bool:
        """Whether this batch holds whole days, `[G, N, ...]`."""
        return self.date.dim() == 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to the GPU does not block."""
        return self.map_tensors(lambda t: t.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, in an order of their own."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map_tensors(collect)
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """Return the batch with other tensors, in the order of `tensors`."""
        remaining = iter(tensors)
        return self.map_tensors(lambda _: next(remaining))

    def flatten(self) -> Batch:
        """Flatten a day batch to `[G * N, ...]`, including padding; others are unchanged."""
        return self.map_tensors(lambda t: t.flatten(0, 1)) if self.is_day else self

    def unflatten(self, num_days: int, width: int) -> Batch:
        """Reshape a batch of `num_days * width` rows to a day batch."""
        return self.map_tensors(lambda t: t.reshape(num_days, width, *t.shape[1:]))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to each of its tensors."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, dict):
                value = {k: function(v) for k, v in value.items()}
            values[item.name] = value
        return Batch(**values)
