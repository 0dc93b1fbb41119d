"""Fit many models at once: those of one architecture as the members of a fleet."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.identity import digest
from qtorch.core.runtime import seed_everything
from qtorch.core.session import resolve_path
from qtorch.data.dataset.samples import Samples
from qtorch.model.devices.numerics import describe_numerics, numerical_settings
from qtorch.model.fleet.checkpoint import FleetCheckpoints
from qtorch.model.fleet.member import Member, architecture_key, refusal
from qtorch.model.fleet.training import FleetTraining
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.checkpoint import preserve_generators
from qtorch.model.loop.interruption import Interruption, TrainingInterrupted
from qtorch.model.loop.recipe import FitInputs, FitResult
from qtorch.model.loop.training import quiet_lightning
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

MAX_CPU_MEMBERS = 64
MEMORY_SHARE = 0.8  # of the free memory, for the members of a fleet


class FleetError(QtorchError, RuntimeError):
    """Some trainings failed; the others are fitted.

    `errors` are the exceptions by the number of the model.
    """

    def __init__(self, errors: Mapping[int, Exception], count: int) -> None:
        self.errors = dict(errors)
        lines = "".join(f"\n  model {k}: {error}" for k, error in sorted(self.errors.items()))
        super().__init__(f"{len(self.errors)} of {count} trainings failed:{lines}")


def fit_fleet(
    models: Sequence[Any],
    datasets: Sequence[Any] | Any,
    *,
    reweighters: Sequence[Any] | Any = None,
    recorders: Sequence[Recorder | None] | None = None,
    max_members: int | None = None,
    folder: str | Path | None = None,
    on_fitted: Callable[[int], None] | None = None,
) -> None:
    """Fit every model as `model.fit(dataset)` would, those of one architecture at once.

    Each member has its own initial weights, sample order, learning rate and schedule, weight decay,
    betas, clipping by its own norm, samples, early stop and best weights, and ends with the weights
    of its serial fit up to rounding (on one device; dropout masks are drawn from one stream for all
    members and differ). Members must share network, batch size, loss and precision; models that
    cannot be members (another kind of model, a training step of its own, callbacks, ...) are fitted
    one after another, and a log line says why.

    `datasets`, `reweighters`: one for all models, or one for each. The same dataset object is
    loaded once and lies on the device once. `recorders`: the run of each model.
    `max_members`: how many members are trained at once; None: as many as the memory bears, on a CPU
    at most 64. Waiting members take the places of those that have ended. `folder`: checkpoints,
    from which the same call resumes after a kill, bit-identical on the CPU; None: no checkpoints.
    `on_fitted(number)` is called when a model has its result, in the order in which they end.

    Raises FleetError at the end if trainings failed, and TrainingInterrupted after Ctrl-C.
    """
    jobs = _Jobs(models, datasets, reweighters, recorders)
    errors: dict[int, Exception] = {}
    finish = on_fitted or (lambda number: None)
    fleets, single = jobs.group(errors)
    for number, reason in single.items():
        log.info("model %d is trained by itself: %s", number, reason)
        with _collect_error(errors, number):
            jobs.fit_alone(number)
            finish(number)
    for members in fleets:
        with _checkpoints(members, folder) as checkpoints:
            if len(members) == 1 and (checkpoints is None or not checkpoints.knows(members[0])):
                number = members[0].number
                log.info("model %d is trained by itself: no other has its architecture", number)
                with _collect_error(errors, number):
                    jobs.fit_alone(number)
                    finish(number)
                continue
            _Fleet(members, checkpoints, errors, finish).run(max_members)
    if errors:
        raise FleetError(errors, len(models))


@contextmanager
def _collect_error(errors: dict[int, Exception], number: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.error("model %d failed: %s", number, error)
        errors[number] = error


class _Jobs:
    """The models with their datasets, reweighters and runs."""

    def __init__(
        self, models: Sequence[Any], datasets: Any, reweighters: Any, recorders: Any
    ) -> None:
        self.models = list(models)
        count = len(self.models)
        self.datasets = _one_for_each(datasets, count, "datasets")
        self.reweighters = _one_for_each(reweighters, count, "reweighters")
        self.recorders = list(recorders) if recorders is not None else [None] * count
        if len(self.recorders) != count:
            raise ConfigError(f"{len(self.recorders)} recorders for {count} models.")
        self._samples: dict[tuple[int, int], tuple[Samples, Samples | None]] = {}
        self._device_samples: dict[tuple[int, torch.device], Samples] = {}
        self._originals: list[Samples] = []

    def group(self, errors: dict[int, Exception]) -> tuple[list[list[Member]], dict[int, str]]:
        """Return the fleets, and the models that are fitted alone with the reason."""
        fleets: dict[Any, list[Member]] = defaultdict(list)
        single: dict[int, str] = {}
        for number, model in enumerate(self.models):
            if not isinstance(model, LightningModel):
                single[number] = f"it is a {type(model).__name__}, not a LightningModel"
                continue
            with _collect_error(errors, number):
                inputs = self._prepare(number)
                network = Member.build_network(inputs)
                reason = refusal(inputs, network)
                if reason is not None:
                    single[number] = f"a fleet cannot have {reason}"
                    continue
                member = Member.create(number, inputs, network, self.recorders[number])
                fleets[architecture_key(inputs, network)].append(member)
        return list(fleets.values()), single

    def _prepare(self, number: int) -> FitInputs:
        """Check the settings of a model and load its samples, on its device."""
        dataset, reweighter = self.datasets[number], self.reweighters[number]
        key = id(dataset), id(reweighter)
        inputs = self.models[number].prepare_fit(
            dataset,
            reweighter,
            recorder=self.recorders[number],
            samples=self._samples.get(key),
        )
        if self.models[number].init_from is None:
            self._samples.setdefault(key, (inputs.train, inputs.valid))
        return replace(
            inputs,
            train=self._move(inputs.train, inputs.device),
            valid=None if inputs.valid is None else self._move(inputs.valid, inputs.device),
        )

    def _move(self, samples: Samples, device: torch.device) -> Samples:
        """Return samples on the device; the same ones for all models that share them."""
        key = id(samples), device
        if key not in self._device_samples:
            self._device_samples[key] = samples.to(device)
            self._originals.append(samples)  # an ID is unique as long as its object exists
        return self._device_samples[key]

    def fit_alone(self, number: int) -> None:
        """Fit a model by itself."""
        options: dict[str, Any] = {}
        if self.recorders[number] is not None:
            options["recorder"] = self.recorders[number]
        if self.reweighters[number] is not None:
            options["reweighter"] = self.reweighters[number]
        self.models[number].fit(self.datasets[number], **options)


def _one_for_each(values: Any, count: int, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise ConfigError(f"{len(values)} {name} for {count} models.")
    return list(values)


def _fleet_folder(members: Sequence[Member], folder: str | Path) -> Path:
    """Return the folder of one fleet: members that are trained together have one."""
    key = digest([repr(architecture_key(members[0].inputs, members[0].network))])
    return resolve_path(folder) / f"fleet-{key[:16]}"


class _Fleet:
    """One fleet from its first round to its last result."""

    def __init__(
        self,
        members: list[Member],
        checkpoints: FleetCheckpoints | None,
        errors: dict[int, Exception],
        finish: Callable[[int], None],
    ) -> None:
        self.members, self.checkpoints = members, checkpoints
        self.errors, self.finish = errors, finish
        self.num_ended = 0

    def run(self, max_members: int | None) -> None:
        """Train all members; a second run continues where a killed one was."""
        recipe = self.members[0].inputs.recipe
        with (
            preserve_generators(),
            quiet_lightning(),
            numerical_settings(recipe.trainer, recipe.matmul_precision),
            Interruption() as interruption,
        ):
            waiting = [m for m in self.members if not self._restore_finished(m)]
            if not waiting:
                return
            device = waiting[0].inputs.device
            seed_everything(_common_seed(self.members))
            limit = max_members or find_max_members(waiting, device)
            training = FleetTraining(waiting, device, limit)
            if self.checkpoints is not None:
                self.checkpoints.restore(training)
            training.fill()
            log.info(
                "fleet of %d members (%d at once) of %s parameters on %s",
                len(waiting),
                len(training.members),
                f"{sum(training.layout.sizes):,}",
                device,
            )
            while training.members:
                self._run_round(training, interruption)
                training.fill()

    def _restore_finished(self, member: Member) -> bool:
        """Take the result of a member that ended before a kill; return whether it has one."""
        if self.checkpoints is None or not self.checkpoints.load_finished(member):
            return False
        self._end(member)
        return True

    def _run_round(self, training: FleetTraining, interruption: Interruption) -> None:
        begin = time.perf_counter()
        count = len(training.members)
        num_samples = sum(len(m.train) for m in training.members)
        ended = training.run_round(interruption.is_requested)
        if ended is None:
            raise TrainingInterrupted(
                f"the fleet was interrupted in round {training.num_rounds}; "
                + (
                    "no checkpoint was saved."
                    if self.checkpoints is None
                    else f"its last complete round is in {self.checkpoints.folder}. The same call "
                    "resumes."
                )
            )
        for member in ended:
            if self.checkpoints is not None:
                self.checkpoints.save_member(member)
        if self.checkpoints is not None and training.members:
            self.checkpoints.save(training)
        for member in ended:
            with preserve_generators():
                self._end(member)
        seconds = time.perf_counter() - begin
        self._log_round(training, count, num_samples / seconds, seconds)

    def _log_round(self, training: FleetTraining, count: int, speed: float, seconds: float) -> None:
        best = [m for m in self.members if m.progress.best_epoch is not None]
        first = min if not best or best[0].stopping.mode == "min" else max
        leader = first(best, key=lambda m: m.progress.best_value, default=None)
        log.info(
            "round %d: %d members running, %d ended, %d waiting%s, %s samples/s (%.2f s)",
            training.num_rounds - 1,
            count,
            self.num_ended,
            len(training.waiting),
            ""
            if leader is None
            else f", best {leader.stopping.monitor} {leader.progress.best_value:.6g} "
            f"(model {leader.number})",
            f"{speed:,.0f}",
            seconds,
        )

    def _end(self, member: Member) -> None:
        """Give the result to the member's model, and call `finish` for it."""
        self.num_ended += 1
        if member.error is not None:
            log.error("model %d failed: %s", member.number, member.error)
            self.errors[member.number] = member.error
            return
        with _collect_error(self.errors, member.number):
            member.inputs.store_result(_result(member, len(self.members)))
            self.finish(member.number)


@contextmanager
def _checkpoints(
    members: Sequence[Member], folder: str | Path | None
) -> Iterator[FleetCheckpoints | None]:
    yield None if folder is None else FleetCheckpoints(_fleet_folder(members, folder))


def _common_seed(members: Sequence[Member]) -> int:
    """Return the seed of the random draws that all members share (dropout)."""
    return int(digest(sorted(m.identity for m in members))[:8], 16) >> 1


def find_max_members(members: Sequence[Member], device: torch.device) -> int:
    """Return how many members fit into the device's memory, from a trial of one and of two."""
    if device.type != "cuda" or len(members) < 3:
        return min(len(members), MAX_CPU_MEMBERS)
    used = [_peak_bytes(members[:count], device) for count in (1, 2)]
    free = torch.cuda.mem_get_info(device)[0]
    each = max(1, used[1] - used[0])
    return max(1, min(len(members), int(MEMORY_SHARE * free / each)))


def _peak_bytes(members: Sequence[Member], device: torch.device) -> int:
    """Return the largest memory of one training step of these members."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial = FleetTraining([copy.deepcopy(m) for m in members], device, len(members))
    trial.fill()
    trial.try_step()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _result(member: Member, num_members: int) -> FitResult:
    """Return the result of a member as that of a serial fit."""
    progress, recipe = member.progress, member.inputs.recipe
    train, valid = member.train, member.valid
    values = [p[member.stopping.monitor] for p in progress.history if member.stopping.monitor in p]
    if values and all(math.isnan(value) for value in values):
        log.warning(
            "model %d: %s was NaN each time: the weights are the last ones, not the best ones.",
            member.number,
            member.stopping.monitor,
        )
    report = {
        "epochs": progress.epochs,
        "best_epoch": progress.best_epoch,
        "best_step": progress.best_step,
        "monitor": member.stopping.monitor,
        "best_value": progress.best_value,
        "seconds": member.seconds,
        "train_seconds": member.seconds,
        "samples": len(train),
        "valid_samples": 0 if valid is None else len(valid),
        "samples_per_second": member.num_samples / member.seconds if member.seconds else 0.0,
        "parameters": sum(p.numel() for p in member.network.parameters()),
        "device": str(train.device),
        "devices": 1,
        "store": train.store,
        "memory": {
            "features": train.num_feature_bytes,
            "weights": sum(p.nbytes for p in member.network.parameters()),
        },
        **describe_numerics(train.device),
        "fleet_members": num_members,
        "seed": recipe.seed,
        "resumed_from": None,
    }
    return FitResult(member.network, progress.history, report, progress.best_optimizer)
