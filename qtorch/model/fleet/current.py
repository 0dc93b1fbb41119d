"""The fleet whose job the current thread runs; imports none of what trains a fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qtorch.data.dataset.samples import Samples
    from qtorch.model.recipe import FitInputs, FitResult
    from qtorch.tracking.recorder import TrainingRecorder


class CurrentFleet(Protocol):
    """What a job calls of its fleet, see `qtorch.model.fleet.fleet.Fleet`."""

    def share_dataset(self, config: Any, build: Callable[[], Any]) -> Any:
        """Return the dataset of a configuration, the same object for equal ones."""

    def share_samples(
        self, dataset: Any, reweighter: Any, load: Callable[[], tuple[Samples, Samples | None]]
    ) -> tuple[Samples, Samples | None]:
        """Return the samples of a dataset, the same for equal reweighters."""

    def check_once(self, config: Any, check: Callable[[], None]) -> None:
        """Check a configuration unless an equal one has passed the check in this fleet."""

    def fit(self, inputs: FitInputs, recorder: TrainingRecorder | None) -> FitResult | None:
        """Fit as a member of the fleet; None if the caller has to fit by itself."""


_fleet: ContextVar[CurrentFleet | None] = ContextVar("qtorch_fleet", default=None)


def current_fleet() -> CurrentFleet | None:
    """Return the fleet whose job this is; None outside of a fleet."""
    return _fleet.get()


@contextmanager
def use_fleet(fleet: CurrentFleet) -> Iterator[None]:
    """Context manager in which this is the current fleet."""
    token = _fleet.set(fleet)
    try:
        yield
    finally:
        _fleet.reset(token)
