"""Fit many models at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.model.fleet.fleet import Fleet
from qtorch.tracking.recorder import Recorder


class FleetError(QtorchError, RuntimeError):
    """Some fits failed; the other models are fitted.

    `errors` are the exceptions by the number of the model.
    """

    def __init__(self, errors: Mapping[int, BaseException], count: int) -> None:
        self.errors = dict(errors)
        lines = "".join(f"\n  model {k}: {error}" for k, error in sorted(self.errors.items()))
        super().__init__(f"{len(self.errors)} of {count} fits failed:{lines}")


def fit_fleet(
    models: Sequence[Any],
    datasets: Any,
    reweighters: Any = None,
    *,
    recorders: Sequence[Recorder | None] | None = None,
    max_members: int | None = None,
    on_fitted: Callable[[int], None] | None = None,
) -> None:
    """Fit every model as `model.fit(dataset)` would, those of one architecture at once.

    Each member has its own initial weights, sample order, learning rate and schedule, weight decay,
    betas, numbers of its loss, clipping, day labels, samples, early stop and best weights, and ends
    with the weights of its fit by itself up to rounding. (Dropout masks are a function of the
    member's seed and step; they do not depend on the other members, but are not those of a fit by
    itself.) Members must have network, batch size, kind of loss, precision and device in common.
    Other models are fitted one after another, and a log line says why.

    `datasets`, `reweighters`: one for all models, or one for each in a list. A dataset that several
    models share is loaded once and lies on the device once. `recorders`: the run of each model; its
    checkpoints are there, from which the same call continues after a kill, bit-identical on a CPU.
    A member's checkpoint is that of the last complete epoch. `max_members`: how many are trained at
    once (None: as many as the memory bears, on a CPU at most 64); the next model takes the place of
    one that has ended. `on_fitted(number)` is called as soon as a model is fitted.

    Raises FleetError at the end if fits failed, and TrainingInterrupted after Ctrl-C.
    """
    count = len(models)
    all_datasets = _one_for_each(datasets, count, "datasets")
    all_reweighters = _one_for_each(reweighters, count, "reweighters")
    runs = _one_for_each(recorders, count, "recorders")

    def fit(number: int) -> None:
        options = {"reweighter": all_reweighters[number], "recorder": runs[number]}
        arguments = {name: value for name, value in options.items() if value is not None}
        models[number].fit(all_datasets[number], **arguments)
        if on_fitted is not None:
            on_fitted(number)

    jobs = Fleet(max_members).run([partial(fit, number) for number in range(count)])
    errors = {job.number: job.error for job in jobs if job.error is not None}
    if errors:
        raise FleetError(errors, count)


def _one_for_each(values: Any, count: int, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise ConfigError(f"{len(values)} {name} for {count} models.")
    return list(values)
