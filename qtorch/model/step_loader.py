"""An epoch's batches for Lightning, several of them for each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qtorch.data.batches import Batch, BatchLoader


class Steps:
    """The batches of one `training_step`: gathered one by one, while they are worked on."""

    def __init__(self, loader: StepLoader, batches: Iterator[Batch], end: int) -> None:
        self._loader, self._batches, self._end = loader, batches, end

    def __iter__(self) -> Iterator[Batch]:
        while self._loader.position < self._end:
            batch = next(self._batches)
            # Before the yield: what is worked on counts as done in a state saved after it.
            self._loader.position += 1
            yield batch

    @property
    def final(self) -> bool:
        """Whether these are the last steps of the epoch."""
        return self._end == self._loader.num_batches

    @property
    def at_end(self) -> bool:
        """Whether the batch at hand is the epoch's last."""
        return self._loader.position == self._loader.num_batches


class StepLoader:
    """What Lightning iterates: `Steps` of up to `inner_steps` batches (a Batch each if `plain`).

    Lightning's own cost is paid once for all batches of a Steps. `cut_every` makes a Steps end
    at each multiple of it in the epoch, so that a checkpoint can be written there. `limit` takes
    the first batches of an epoch alone. `epoch` tells the running epoch's number: the order of
    its batches depends on it and the loader's seed alone.

    A saved state holds the position in the epoch; the epoch that is taken up again starts there,
    with the number of Steps still to come that Lightning expects.
    """

    def __init__(
        self,
        source: BatchLoader,
        epoch: Callable[[], int],
        *,
        inner_steps: int = 1,
        limit: int | None = None,
        cut_every: int | None = None,
        plain: bool = False,
    ) -> None:
        self.source = source
        self.num_batches = len(source) if limit is None else min(limit, len(source))
        self.position = 0
        self.begun = 0  # the position from which this process worked on the epoch
        self._epoch, self._plain = epoch, plain
        self._chunk = 0
        self._resume: dict[str, int] | None = None
        self.cut(inner_steps, cut_every)

    def cut(self, inner_steps: int, cut_every: int | None) -> None:
        """Say anew where each Steps ends. An epoch that is taken up again needs the cuts of the
        training that began it, or Lightning's counts would not fit; numbers do not depend on it.
        """
        self.inner_steps = 1 if self._plain else inner_steps
        self.cut_every = cut_every
        ends = {self.num_batches, *range(self.inner_steps, self.num_batches, self.inner_steps)}
        if cut_every is not None:
            ends |= set(range(cut_every, self.num_batches, cut_every))
        self._ends = sorted(ends) if self.num_batches else []

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Steps | Batch]:
        epoch = self._epoch()
        self.position, self._chunk = self._start(epoch)
        self.begun = self.position
        batches = self.source.batches(epoch, self.position)
        for end in self._ends[self._chunk :]:
            self._chunk += 1
            if self._plain:
                batch = next(batches)
                self.position += 1
                yield batch
            else:
                yield Steps(self, batches, end)

    def _start(self, epoch: int) -> tuple[int, int]:
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != epoch or state["position"] >= self.num_batches:
            return 0, 0
        return state["position"], state["chunk"]

    def state_dict(self) -> dict[str, Any]:
        """Where the running epoch stands."""
        return {"epoch": self._epoch(), "position": self.position, "chunk": self._chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the epoch of a saved state: the next iteration goes on from there."""
        self._resume = {k: int(state[k]) for k in ("epoch", "position", "chunk")}
