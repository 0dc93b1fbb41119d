"""Batches of samples, in an order that depends only on (seed, epoch, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from qtorch.data.sample_set import Samples

Order = Literal["random", "sequential", "day", "day_sequential"]
ORDERS: tuple[str, ...] = ("random", "sequential", "day", "day_sequential")


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
        return self._map_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to the GPU does not block."""
        return self._map_tensors(lambda t: t.pin_memory())

    def flatten(self) -> Batch:
        """Flatten a day batch to `[G * N, ...]`, including padding; others are unchanged."""
        return self._map_tensors(lambda t: t.flatten(0, 1)) if self.is_day else self

    def unflatten(self, num_days: int, width: int) -> Batch:
        """Reshape a batch of `num_days * width` rows to a day batch."""
        return self._map_tensors(lambda t: t.reshape(num_days, width, *t.shape[1:]))

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, dict):
                value = {k: function(v) for k, v in value.items()}
            values[item.name] = value
        return Batch(**values)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a CPU generator that depends only on (seed, epoch)."""
    digest = hashlib.sha256(f"qtorch order {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class EpochSampler:
    """A minimal sampler with `set_epoch`, which Lightning looks for on a data loader."""

    def __init__(self, num_samples: int) -> None:
        self.epoch = 0
        self._num_samples = num_samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_samples


class BatchLoader:
    """Iterate over Samples in batches; one iteration is one epoch with every sample exactly once.

    `order`: "random" shuffles samples, "sequential" follows (datetime, instrument), "day" yields
    `days_per_batch` whole days `[G, N, ...]` per batch in shuffled order, "day_sequential" the
    same in chronological order. The order depends only on (seed, epoch), not on a global random
    generator or on the device. The last batch may be smaller. With `pad_tail` it is padded and
    every batch has a mask, so that all batches have the same shape (for torch.compile).

    `state_dict` and `load_state_dict` hold (epoch, step): a loader that is resumed in mid-epoch
    yields exactly the batches that were left.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int = 800,
        order: Order = "random",
        seed: int = 0,
        days_per_batch: int = 1,
        pad_tail: bool = False,
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(unknown_name("order", order, ORDERS))
        for name, value in (("batch_size", batch_size), ("days_per_batch", days_per_batch)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self.samples = samples
        self.order: str = order
        self.seed = seed
        self.pad_tail = pad_tail
        self.by_day = order.startswith("day")
        self.size = days_per_batch if self.by_day else batch_size
        self.sampler = EpochSampler(len(samples))
        self._step = 0
        self._resume: tuple[int, int] | None = None

    # -- order ---------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.samples.num_days if self.by_day else len(self.samples)

    def __len__(self) -> int:
        return -(-self._count // self.size)

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the epoch's permutation of the samples (or days, for day batches), on the CPU."""
        if self.order in ("sequential", "day_sequential"):
            return torch.arange(self._count)
        return torch.randperm(self._count, generator=epoch_generator(self.seed, epoch))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self.sampler.set_epoch(epoch)

    # -- iteration -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.sampler.epoch, 0
        if self._resume is not None:
            if self._resume[0] == epoch and self._resume[1] < len(self):
                start = self._resume[1]
            self._resume = None
        self._step = start
        for step, batch in enumerate(self.batches(epoch, start), start):
            # Set before the yield: Lightning does not run a sized iterable to exhaustion, and a
            # state that is saved during this batch must resume with the next one.
            self._step = step + 1
            yield batch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's batches from `start_step` on; the loader's state is unchanged."""
        order = self.epoch_order(epoch)
        device_order = order if self.by_day else order.to(self.samples.index_device)
        steps = range(start_step, len(self))
        if self.samples.store != "host":
            for step in steps:
                yield self._batch(order, device_order, step)
            return
        next_batch: Batch | None = None
        for step in steps:
            # Copy the next batch to the device while the caller works on this one.
            batch, next_batch = (
                next_batch,
                self.samples.send_to_device(self._batch(order, device_order, step)),
            )
            if batch is not None:
                yield batch
        if next_batch is not None:
            yield next_batch

    def _batch(self, order: Tensor, device_order: Tensor, step: int) -> Batch:
        part = slice(step * self.size, (step + 1) * self.size)
        if self.by_day:
            pad = self.size if self.pad_tail else None
            return self.samples.day_batch(order[part], num_days=pad)
        pad = self.size if self.pad_tail else None
        return self.samples.batch(device_order[part], size=pad)

    # -- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Return the running epoch and its next step."""
        return {"epoch": self.sampler.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved state: the next iteration of that epoch starts at its step."""
        self._resume = (int(state["epoch"]), int(state["step"]))
        self._step = int(state["step"])
        self.sampler.set_epoch(int(state["epoch"]))
