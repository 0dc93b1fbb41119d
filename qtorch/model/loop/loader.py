"""The loader of an epoch's batches for Lightning, with several batches per training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.samples import Samples
from qtorch.model.loop.scoring import evaluation_batch_size, evaluation_days


class StepBatches:
    """The batches of one `training_step`, each gathered when the step asks for it."""

    def __init__(self, loader: StepLoader, batches: Iterator[Batch], end: int) -> None:
        self._loader, self._batches, self._end = loader, batches, end

    def __iter__(self) -> Iterator[Batch]:
        while self._loader.position < self._end:
            batch = next(self._batches)
            # Count the batch before the yield: a state saved after the step includes it.
            self._loader.position += 1
            yield batch

    @property
    def is_last(self) -> bool:
        """Whether this is the last training step of the epoch."""
        return self._end == self._loader.num_batches

    @property
    def is_epoch_end(self) -> bool:
        """Whether the current batch is the last one of the epoch."""
        return self._loader.position == self._loader.num_batches


class SingleStep:
    """One batch as the batches of a `training_step`."""

    def __init__(self, loader: StepLoader, batch: Batch) -> None:
        self._loader, self._batch = loader, batch

    def __iter__(self) -> Iterator[Batch]:
        yield self._batch

    @property
    def is_last(self) -> bool:
        """Whether this is the last training step of the epoch."""
        return self._loader.position == self._loader.num_batches

    is_epoch_end = is_last


def unpack_batches(batches: StepBatches | Batch) -> Iterable[Batch]:
    """Return the batches of a validation step."""
    return [batches] if isinstance(batches, Batch) else batches


class StepLoader:
    """The iterable that Lightning trains on.

    It yields a `StepBatches` of up to `inner_steps` batches per training step, so that Lightning's
    overhead is paid once per step. With `inner_steps=1`, and always with `yield_batches`, it yields
    each `Batch` itself, so that hooks of callbacks see it. With `cut_every`,
    a step ends at each multiple of it in the epoch, so that a checkpoint can be written there.
    `limit` keeps only the first batches of an epoch. `epoch` returns the number of the running
    epoch: the order of its batches depends on that and on the loader's seed only. With
    `same_batches` every epoch has the batches of the first one.

    A saved state holds the position in the epoch. A resumed epoch starts there and yields the
    number of remaining steps that Lightning expects.
    """

    def __init__(
        self,
        source: BatchLoader,
        epoch: Callable[[], int],
        *,
        inner_steps: int = 1,
        limit: int | None = None,
        cut_every: int | None = None,
        yield_batches: bool = False,
        same_batches: bool = False,
    ) -> None:
        self.source = source
        self.num_batches = len(source) if limit is None else min(limit, len(source))
        self.position = 0
        self.start_position = 0  # the epoch's position at which this process started
        self._epoch, self._yield_batches = epoch, yield_batches
        self._same_batches = same_batches
        self._chunk = 0
        self._resume: dict[str, int] | None = None
        self.set_boundaries(inner_steps, cut_every)

    def set_boundaries(self, inner_steps: int, cut_every: int | None) -> None:
        """Set the boundaries between training steps.

        A resumed epoch needs the boundaries of the training that started it, because Lightning's
        counters refer to them. The numbers do not depend on them.
        """
        self.inner_steps = 1 if self._yield_batches else inner_steps
        self.cut_every = cut_every
        ends = {self.num_batches, *range(self.inner_steps, self.num_batches, self.inner_steps)}
        if cut_every is not None:
            ends |= set(range(cut_every, self.num_batches, cut_every))
        self._ends = sorted(ends) if self.num_batches else []

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[StepBatches | Batch]:
        epoch = self._epoch()
        self.position, self._chunk = self._start(epoch)
        self.start_position = self.position
        batches = self.source.batches(0 if self._same_batches else epoch, self.position)
        for end in self._ends[self._chunk :]:
            self._chunk += 1
            if self.inner_steps == 1:
                batch = next(batches)
                self.position += 1
                yield batch
            else:
                yield StepBatches(self, batches, end)

    @property
    def can_resume(self) -> bool:
        """Whether an epoch that is resumed at this position has training steps left."""
        return self._chunk < len(self._ends)

    def load_usual_batch(self) -> Batch:
        """Return the first batch of the first epoch; all but the last one have its shape."""
        return next(self.source.batches(0))

    def release_samples(self) -> None:
        """Drop the samples after training: Lightning's objects hold this loader for longer."""
        del self.source

    def _start(self, epoch: int) -> tuple[int, int]:
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != epoch or state["position"] >= self.num_batches:
            return 0, 0
        return state["position"], state["chunk"]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the running epoch."""
        return {"epoch": self._epoch(), "position": self.position, "chunk": self._chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved position: the next iteration continues from there."""
        self._resume = {k: int(state[k]) for k in ("epoch", "position", "chunk")}


def training_arguments(batch: Mapping[str, Any], min_tail: int) -> dict[str, Any]:
    """Return the arguments of a BatchLoader for training, from a model's `batch` options."""
    return {
        "batch_size": batch["size"],
        "order": batch["order"],
        "days_per_batch": batch["days_per_batch"],
        "min_tail": min_tail,
    }


def validation_arguments(batch: Mapping[str, Any], samples: Samples, loss: Any) -> dict[str, Any]:
    """Return the arguments of a BatchLoader for validation, from a model's `batch` options.

    `loss`: the loss, or None for a user's module.
    """
    return {
        "batch_size": evaluation_batch_size(batch, samples.device),
        "order": "day_sequential" if batch["order"].startswith("day") else "sequential",
        "days_per_batch": evaluation_days(batch, loss, samples, samples.device),
        "min_tail": 1,
    }


def count_batches(source: BatchLoader, *, drops_last: bool) -> int:
    """Return the number of batches of an epoch; with `drops_last`, without a smaller last one."""
    samples, num_batches = source.samples, len(source)
    count = samples.num_days if source.by_day else len(samples)
    is_smaller = num_batches > 1 and count < num_batches * source.size
    return num_batches - int(drops_last and is_smaller)


def has_batch_norms(network: nn.Module) -> bool:
    """Whether a network has batch norms, which cannot be trained on a single sample."""
    return any(isinstance(m, _BatchNorm) for m in network.modules())
