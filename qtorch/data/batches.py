"""Batches: what a network sees at one step, in an order that (seed, epoch, step) determines."""

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
    """Samples for one step; day batches have `[G, N, ...]` where these have `[B, ...]`.

    `x [B, T, F]` float32; `y [B, Q]` the processed labels; `weight [B]`; `mask [B]` bool, False
    for padding (None: every row is a sample); `date [B]` calendar rows and `instrument [B]`
    columns, int64; `extra` named tensors, `raw_label [B, Q]` among them where it is known.
    Padded rows have x 0, weight 0 and NaN in y and raw_label, so that a loss or metric that
    forgets the mask is loud.

    Where several ranks share a batch, `num_whole` counts the rows (days) of all of them; `blank`
    says that this rank has none and works on samples whose labels are NaN, for company.
    """

    x: Tensor
    date: Tensor
    instrument: Tensor
    y: Tensor | None = None
    weight: Tensor | None = None
    mask: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    num_samples: int = 0
    num_whole: int = 0
    blank: bool = False

    def __post_init__(self) -> None:
        self.num_samples = self.num_samples or self.date.numel()

    @property
    def is_day(self) -> bool:
        """Whether this batch holds whole days, `[G, N, ...]`."""
        return self.date.dim() == 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where a copy to the GPU does not block."""
        return self._each(lambda t: t.pin_memory())

    def flat(self) -> Batch:
        """A day batch as `[G * N, ...]`, padding and mask kept; another batch unchanged."""
        return self._each(lambda t: t.flatten(0, 1)) if self.is_day else self

    def unflattened(self, num_days: int, width: int) -> Batch:
        """A batch of `num_days * width` rows as a day batch."""
        return self._each(lambda t: t.reshape(num_days, width, *t.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = change(value)
            elif isinstance(value, dict):
                value = {k: change(v) for k, v in value.items()}
            values[item.name] = value
        return Batch(**values)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that depends on nothing but (seed, epoch)."""
    digest = hashlib.sha256(f"qtorch order {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class EpochSampler:
    """What Lightning looks for on a loader: `set_epoch`."""

    def __init__(self, num_samples: int) -> None:
        self.epoch = 0
        self._num_samples = num_samples

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_samples


class BatchLoader:
    """Batches of Samples; iterating gives one epoch, every sample exactly once.

    `order`: "random" shuffles samples, "sequential" follows (datetime, instrument), "day" gives
    `days_per_batch` whole days `[G, N, ...]` a batch in shuffled order, "day_sequential" the
    same in order of time. The order depends on (seed, epoch) alone, not on any global generator
    or the device. The last batch is smaller where the samples do not fill it; with `pad_tail`
    it is filled up and every batch has a mask, so that shapes stay the same (for compiling).

    `state_dict` and `load_state_dict` hold (epoch, step): a loader resumed in mid-epoch goes on
    with exactly the batches that were still to come.
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

    # -- the order -----------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.samples.num_days if self.by_day else len(self.samples)

    def __len__(self) -> int:
        return -(-self._count // self.size)

    def order_of(self, epoch: int) -> Tensor:
        """The epoch's permutation of the sample rows (of the days, for day batches), on the CPU."""
        if self.order in ("sequential", "day_sequential"):
            return torch.arange(self._count)
        return torch.randperm(self._count, generator=epoch_generator(self.seed, epoch))

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration follows."""
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
            # Before the yield: a sized iterable is not run to exhaustion, and a state saved while
            # this batch is worked on must go on behind it.
            self._step = step + 1
            yield batch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on; the loader's own state is not touched."""
        order = self.order_of(epoch)
        on_device = order if self.by_day else order.to(self.samples.index_device)
        steps = range(start_step, len(self))
        if self.samples.store != "host":
            for step in steps:
                yield self._batch(order, on_device, step)
            return
        ahead: Batch | None = None
        for step in steps:
            # The next batch is on its way while this one is worked on.
            batch, ahead = ahead, self.samples.sent(self._batch(order, on_device, step))
            if batch is not None:
                yield batch
        if ahead is not None:
            yield ahead

    def _batch(self, order: Tensor, on_device: Tensor, step: int) -> Batch:
        part = slice(step * self.size, (step + 1) * self.size)
        if self.by_day:
            pad = self.size if self.pad_tail else None
            return self.samples.day_batch(order[part], num_days=pad)
        pad = self.size if self.pad_tail else None
        return self.samples.batch(on_device[part], size=pad)

    # -- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where the running epoch stands: the next step."""
        return {"epoch": self.sampler.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state: the next iteration of that epoch starts at its step."""
        self._resume = (int(state["epoch"]), int(state["step"]))
        self._step = int(state["step"])
        self.sampler.set_epoch(int(state["epoch"]))
